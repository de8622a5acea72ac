"""MBPP (Austin et al., 2021, arXiv 2108.07732): short Python programs.

The splits are upstream's, by task number: 11 to 510 test, 511 to 600
validation, 601 and above train. As in the paper's prompt, a question shows
its tests, which also say what the function is called. `mbpp_sanitized` is
upstream's subset that people have checked.
"""

from __future__ import annotations

import json
import re

from exectune_jax.episode import Problem, Tests
from exectune_jax.tasks import tfds_source
from exectune_jax.tasks.base import CodeTask
from exectune_jax.tasks.jsonl import read_json_lines

_URL = ('https://raw.githubusercontent.com/google-research/google-research/'
        'master/mbpp/')
_SPLITS = {'test': range(11, 511), 'validation': range(511, 601),
           'train': range(601, 10**6), 'all': range(10**6)}


class ExectuneMbpp(tfds_source.UpstreamBuilder):
  """Upstream's JSON lines."""

  FILES = {'problems': 'mbpp.jsonl'}
  URLS = {'problems': f'{_URL}mbpp.jsonl'}
  # setup: what the tests alone begin with; it may use the program.
  FIELDS = ('task_id', 'text', 'code', 'imports', 'setup', 'tests')
  UPSTREAM = ('task_id', 'text', 'code', 'test_setup_code', 'test_list')

  def rows(self, path):
    for row in read_json_lines(path, self.UPSTREAM):
      yield self.row(row, row['text'], '', row['test_setup_code'])

  def row(self, row, text, imports, setup):
    return {'task_id': str(row['task_id']), 'text': text, 'setup': setup,
            'imports': imports, 'code': row['code'],
            'tests': json.dumps(row['test_list'])}


class ExectuneMbppSanitized(ExectuneMbpp):
  """Upstream's JSON array, or the same as JSON lines."""

  FILES = {'problems': 'mbpp_sanitized.jsonl'}
  URLS = {'problems': f'{_URL}sanitized-mbpp.json'}
  UPSTREAM = ('task_id', 'prompt', 'code', 'test_imports', 'test_list')

  def rows(self, path):
    for row in read_json_lines(path, self.UPSTREAM):
      yield self.row(row, row['prompt'], '\n'.join(row['test_imports']), '')


class MBPP(CodeTask):
  """task.data_dir: directory with mbpp.jsonl."""

  BUILDER = ExectuneMbpp

  def problems(self, split):
    rows = tfds_source.read(self.BUILDER, self.options.data_dir, 'problems')
    size = 0 if split == 'all' else self.options[f'{split}_size']
    found = [_problem(row) for row in rows
             if int(row['task_id']) in _SPLITS[split]]
    return found[:size or None]


class SanitizedMBPP(MBPP):
  """task.data_dir: directory with mbpp_sanitized.jsonl."""

  BUILDER = ExectuneMbppSanitized


def _problem(row) -> Problem:
  tests = json.loads(row['tests'])
  shown = '\n'.join(test.strip() for test in tests)
  defined = re.findall(r'^(?:def|class)\s+(\w+)', row['code'], re.MULTILINE)
  called = [name for name in defined if re.search(rf'\b{name}\(', shown)]
  return Problem(
      f'mbpp-{row["task_id"]}',
      f'{row["text"].strip()}\nIt must pass these tests:\n{shown}',
      row['code'],
      tests=Tests(f'{row["setup"]}\n{shown}', called[-1] if called else '',
                  row['imports']))
