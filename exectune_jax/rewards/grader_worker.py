"""Child process of graders.py: a JSON question a line, an answer a line.

The first line says which task to make; then [method, problem, text] is
answered by ['ok', value] or ['lost', reason].
"""

import dataclasses
import json
import os
import sys

import ml_collections

from exectune_jax.episode import problem_from
from exectune_jax.errors import Lost, UserError
from exectune_jax.tasks import make_task


def main():
  # A task that prints must not garble the answers.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  hello = json.loads(sys.stdin.readline())
  task = make_task(ml_collections.ConfigDict(hello['options']),
                   hello['shots'])
  for line in sys.stdin:
    method, problem, text = json.loads(line)
    print(json.dumps(_answer(task, method, problem_from(problem), text)),
          file=answers, flush=True)


def _answer(task, method, problem, text):
  try:
    value = getattr(task, method)(problem, text)
  except (Lost, UserError) as e:
    return ['lost', str(e)]
  except Exception as e:  # noqa: BLE001 whatever a user's task raises
    return ['lost', f'grader crashed: {e!r}']
  return ['ok', dataclasses.asdict(value) if dataclasses.is_dataclass(value)
          else bool(value)]


if __name__ == '__main__':
  main()
