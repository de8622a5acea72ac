"""KodCode (Xu et al., 2025, arXiv 2503.02951): synthetic Python problems.

Its licence is CC BY-NC 4.0: for non-commercial use, from a copy of your own.
With the Hugging Face package `datasets`:

  load_dataset('KodCode/KodCode-V1', split='train').to_json('kodcode.jsonl')

The last tenth of the rows is the test split, the tenth before it validation,
each at most 1,000 rows.
"""

from __future__ import annotations

import json
import re

from exectune_jax.episode import Problem, Tests
from exectune_jax.tasks import tfds_source
from exectune_jax.tasks.base import CodeTask
from exectune_jax.tasks.jsonl import read_json_lines

_IMPORTED = re.compile(r'^\s*from\s+solution\s+import\s+(.+)$', re.MULTILINE)


class ExectuneKodcode(tfds_source.UpstreamBuilder):
  """JSON lines with what upstream's columns hold."""

  FILES = {'problems': 'kodcode.jsonl'}
  FIELDS = ('question_id', 'question', 'solution', 'test', 'declaration')

  def rows(self, path):
    for row in read_json_lines(path, self.FIELDS[:-1]):
      info = row.get('test_info') or []  # a list, or one as text
      info = json.loads(info) if isinstance(info, str) else info
      yield {**row, 'declaration': ', '.join(
          i.get('function_declaration', '').rstrip(':') for i in info)}


class KodCode(CodeTask):
  """task.data_dir: directory with kodcode.jsonl."""

  def problems(self, split):
    rows = list(tfds_source.read(ExectuneKodcode, self.options.data_dir,
                                 'problems'))
    held = min(1000, len(rows) // 10)
    ranges = {'train': rows[:len(rows) - 2 * held],
              'validation': rows[len(rows) - 2 * held:len(rows) - held],
              'test': rows[len(rows) - held:]}
    limit = self.options[f'{split}_size'] or None
    return [_problem(row) for row in ranges[split][:limit]]


def _problem(row) -> Problem:
  question = row['question'].strip()
  names = [name.strip() for name in _IMPORTED.findall(row['test'])]
  wanted = row['declaration'].strip() or ', '.join(names)
  if wanted:  # the tests know the name, the question may not
    question += f'\nIt must define: {wanted}'
  single = names[0] if len(names) == 1 and names[0].isidentifier() else ''
  return Problem(row['question_id'], question, row['solution'],
                 tests=Tests(row['test'], single))
