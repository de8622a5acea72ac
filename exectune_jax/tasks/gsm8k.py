"""GSM8K (Cobbe et al., 2021, arXiv 2110.14168): grade school mathematics.

Upstream ships train.jsonl and test.jsonl; the last 500 training problems
are our validation split.
"""

from __future__ import annotations

import pathlib

import tensorflow_datasets as tfds

from exectune_jax.episode import Problem
from exectune_jax.tasks import tfds_source
from exectune_jax.tasks.base import MathTask
from exectune_jax.tasks.jsonl import read_json_lines

_URL = ('https://raw.githubusercontent.com/openai/grade-school-math/master/'
        'grade_school_math/data/')
_FILES = {'train': 'gsm8k_train.jsonl', 'test': 'gsm8k_test.jsonl'}
_SPLITS = {'train': 'train[:-500]', 'validation': 'train[-500:]',
           'test': 'test'}


class ExectuneGsm8k(tfds.core.GeneratorBasedBuilder):
  """Reads the upstream JSON lines from `source`, or downloads them."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First.'}

  def __init__(self, *, source: str = '', **kwargs):
    self._source = source
    super().__init__(**kwargs)

  def _info(self):
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
        builder=self, description='GSM8K, upstream order.',
        disable_shuffling=True, features=tfds.features.FeaturesDict(
            {'question': text(), 'answer': text()}))

  def _split_generators(self, dl_manager):
    if self._source:
      paths = {s: pathlib.Path(self._source) / f for s, f in _FILES.items()}
    else:
      paths = dl_manager.download({s: f'{_URL}{s}.jsonl' for s in _FILES})
    return {s: self._generate_examples(p) for s, p in paths.items()}

  def _generate_examples(self, path):
    for i, row in enumerate(read_json_lines(pathlib.Path(path),
                                            ('question', 'answer'))):
      yield i, {'question': row['question'], 'answer': row['answer']}


class GSM8K(MathTask):
  """task.data_dir: directory with gsm8k_train.jsonl and gsm8k_test.jsonl."""

  def problems(self, split):
    rows = tfds_source.read(ExectuneGsm8k, self.options.data_dir,
                            tuple(_FILES.values()), _SPLITS[split])
    limit = self.options[f'{split}_size'] or None
    # The reference answer stands behind '####' at the end of the solution.
    found = [Problem(f'{split}-{i}', row['question'],
                     row['answer'].rpartition('####')[2].strip())
             for i, row in enumerate(rows)]
    return found[:limit]
