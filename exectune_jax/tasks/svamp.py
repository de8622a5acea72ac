"""SVAMP (Patel et al., 2021, arXiv 2103.07191): varied one-step problems.

Upstream ships one file of 1,000 problems. Here the first 600 are train, the
next 100 validation and the last 300 test; 'all' is the whole file, for use
as a transfer test by runs that never train on it. `task.max_number` keeps
only problems that state no larger number.
"""

from __future__ import annotations

import json

from exectune_jax.episode import Problem
from exectune_jax.errors import UserError
from exectune_jax.tasks import tfds_source, verify_math
from exectune_jax.tasks.base import MathTask

_URL = 'https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json'
_SPLITS = {'train': 'problems[:600]', 'validation': 'problems[600:700]',
           'test': 'problems[700:]', 'all': 'problems'}


class ExectuneSvamp(tfds_source.UpstreamBuilder):
  """Upstream's one file, a JSON array."""

  FILES = {'problems': 'svamp.json'}
  URLS = {'problems': _URL}
  FIELDS = ('question', 'answer')

  def rows(self, path):
    try:
      for i, row in enumerate(json.loads(path.read_text('utf-8'))):  # noqa: B007
        body = row['Body'].strip().rstrip('.,')
        yield {'question': f'{body}. {row["Question"].strip()}',
               'answer': _plain(float(row['Answer']))}
    except json.JSONDecodeError as e:
      raise UserError(f'{path}:{e.lineno}: not JSON: {e.msg}') from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
      raise UserError(f'{path}: problem {i}: needs Body, Question and a '
                      f'numeric Answer ({e!r})') from e


class SVAMP(MathTask):
  """task.data_dir: directory with svamp.json."""

  def problems(self, split):
    rows = tfds_source.read(ExectuneSvamp, self.options.data_dir,
                            _SPLITS[split])
    found = [Problem(f'svamp-{split}-{i}', row['question'], row['answer'])
             for i, row in enumerate(rows)]
    limit = self.options.max_number
    if limit:
      found = [p for p in found if _largest(p) <= limit]
    size = 0 if split == 'all' else self.options[f'{split}_size']
    return found[:size or None]


def _plain(value: float) -> str:
  return str(int(value)) if value.is_integer() else repr(value)


def _largest(problem: Problem):
  numbers = [verify_math.to_fraction(m.group()) for m in
             verify_math.NUMBER.finditer(problem.question)]
  return max((n for n in numbers if n is not None), default=0)
