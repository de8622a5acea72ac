"""HumanEval (Chen et al., 2021, arXiv 2107.03374): 164 Python functions.

A test set: train on mbpp or kodcode, and name it in evaluate.transfer.
"""

from __future__ import annotations

from exectune_jax.episode import Problem, Tests
from exectune_jax.errors import UserError
from exectune_jax.tasks import tfds_source
from exectune_jax.tasks.base import CodeTask
from exectune_jax.tasks.jsonl import read_json_lines


class ExectuneHumaneval(tfds_source.UpstreamBuilder):
  """Upstream's one file of JSON lines, unpacked or not."""

  FILES = {'test': 'humaneval.jsonl'}
  URLS = {'test': 'https://raw.githubusercontent.com/openai/human-eval/master/'
                  'data/HumanEval.jsonl.gz'}
  FIELDS = ('task_id', 'prompt', 'entry_point', 'canonical_solution', 'test')

  def rows(self, path):
    yield from read_json_lines(path, self.FIELDS)


class HumanEval(CodeTask):
  """task.data_dir: directory with humaneval.jsonl."""

  def problems(self, split):
    if split != 'test':
      raise UserError(f"task.name='humaneval': has no {split} split; train on "
                      "mbpp or kodcode and set evaluate.transfer='humaneval'")
    rows = tfds_source.read(ExectuneHumaneval, self.options.data_dir, 'test')
    found = [Problem(
        row['task_id'], row['prompt'], row['canonical_solution'],
        tests=Tests(f'{row["test"]}\ncheck({row["entry_point"]})\n',
                    row['entry_point'], row['prompt'])) for row in rows]
    return found[:self.options.test_size or None]
