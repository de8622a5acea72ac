"""GSM8K (Cobbe et al., 2021, arXiv 2110.14168): grade school mathematics.

Upstream ships train.jsonl and test.jsonl; the last 500 training problems
are our validation split.
"""

from __future__ import annotations

from exectune_jax.episode import Problem
from exectune_jax.tasks import tfds_source
from exectune_jax.tasks.base import MathTask
from exectune_jax.tasks.jsonl import read_json_lines

_URL = ('https://raw.githubusercontent.com/openai/grade-school-math/master/'
        'grade_school_math/data/')
_SPLITS = {'train': 'train[:-500]', 'validation': 'train[-500:]',
           'test': 'test'}


class ExectuneGsm8k(tfds_source.UpstreamBuilder):
  """Upstream's two files of JSON lines."""

  FILES = {'train': 'gsm8k_train.jsonl', 'test': 'gsm8k_test.jsonl'}
  URLS = {split: f'{_URL}{split}.jsonl' for split in FILES}
  FIELDS = ('question', 'answer')

  def rows(self, path):
    yield from read_json_lines(path, self.FIELDS)


class GSM8K(MathTask):
  """task.data_dir: directory with gsm8k_train.jsonl and gsm8k_test.jsonl."""

  def problems(self, split):
    rows = tfds_source.read(ExectuneGsm8k, self.options.data_dir,
                            _SPLITS[split])
    limit = self.options[f'{split}_size'] or None
    # The reference answer stands behind '####' at the end of the solution.
    found = [Problem(f'{split}-{i}', row['question'],
                     row['answer'].rpartition('####')[2].strip())
             for i, row in enumerate(rows)]
    return found[:limit]
