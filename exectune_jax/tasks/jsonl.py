"""Problems from JSON lines: your own, or those of public data sets."""

from __future__ import annotations

import json
import pathlib

from exectune_jax.episode import Problem
from exectune_jax.errors import UserError
from exectune_jax.tasks.base import MathTask


def read_json_lines(path: pathlib.Path, fields: tuple[str, ...]) -> list[dict]:
  """Rows of a JSON lines file, each an object with the named fields.

  Raises:
    UserError: names the file and the line.
  """
  if not path.is_file():
    raise UserError(f"task.data_dir='{path.parent}': there is no {path.name}")
  rows = []
  try:
    lines = path.read_text('utf-8').split('\n')
  except UnicodeDecodeError as e:
    raise UserError(f'{path}: not UTF-8 text: {e.reason}') from e
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as e:
      raise UserError(f'{path}:{number}: not JSON: {e.msg}') from e
    missing = [f for f in fields if not isinstance(row, dict) or f not in row]
    if missing:
      raise UserError(f"{path}:{number}: needs an object with the field "
                      f"'{missing[0]}'")
    rows.append(row)
  return rows


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
