"""Problems from JSON lines: your own, or those of public data sets."""

from __future__ import annotations

import gzip
import json
import pathlib

from exectune_jax.episode import Problem
from exectune_jax.errors import UserError
from exectune_jax.tasks.base import MathTask

GZIP = b'\x1f\x8b'  # what such a file begins with


def read_json_lines(path: pathlib.Path, fields: tuple[str, ...]) -> list[dict]:
  """Objects of a file with one a line, or with one array of all.

  Raises:
    UserError: names the file and the line (of an array, the row) that is not
      an object with these fields.
  """
  if not path.is_file():
    raise UserError(f"task.data_dir='{path.parent}': there is no {path.name}")
  rows = []
  for number, row in _numbered(path):
    missing = [f for f in fields if not isinstance(row, dict) or f not in row]
    if missing:
      raise UserError(f"{path}:{number}: needs an object with the field "
                      f"'{missing[0]}'")
    rows.append(row)
  return rows


def _numbered(path):
  try:
    data = path.read_bytes()
    text = (gzip.decompress(data) if data.startswith(GZIP) else data).decode()
  except UnicodeDecodeError as e:
    raise UserError(f'{path}: not UTF-8 text: {e.reason}') from e
  number = 1
  try:
    if text.startswith('['):
      yield from enumerate(json.loads(text), 1)
      return
    for number, line in enumerate(text.split('\n'), 1):
      if line.strip():
        yield number, json.loads(line)
  except json.JSONDecodeError as e:
    line = number + e.lineno - 1
    raise UserError(f'{path}:{line}: not JSON: {e.msg}') from e


class JsonLines(MathTask):
  """Reads train.jsonl, validation.jsonl and test.jsonl of task.data_dir.

  Each line is {"question": ..., "answer": ...} with a number as answer.
  """

  def problems(self, split):
    path = pathlib.Path(self.options.data_dir) / f'{split}.jsonl'
    rows = read_json_lines(path, ('question', 'answer'))
    limit = self.options[f'{split}_size'] or None
    return [Problem(f'{split}-{i}', str(row['question']), str(row['answer']))
            for i, row in enumerate(rows[:limit])]
