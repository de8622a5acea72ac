"""What a stage will ask of which core, and what that costs, before it starts.

Dollars a call are the mean of this core's calls so far where the ledger
knows some; else the prompt's tokens are guessed from its length, and replies
are taken to be half of max_tokens long.
"""

from __future__ import annotations

import dataclasses
import statistics

from rich.table import Table

from exectune_jax import progress, prompts
from exectune_jax.config import UNGUIDED
from exectune_jax.cores import prices
from exectune_jax.cores.base import draws_alone, guess_input_tokens
from exectune_jax.cores.ledger import Ledger, path_of, stage_of
from exectune_jax.tasks import load_problems, make_task, transfer

ENOUGH = 20  # calls from which a mean is taken


@dataclasses.dataclass(frozen=True)
class Line:
  """Calls of one config section: expected, at most; dollars of both."""
  field: str
  calls: int
  most: int
  usd: float
  most_usd: float


def counts(config, stage: str, sizes: dict[str, int]) -> dict[str, tuple]:
  """section -> (expected calls, most calls) of one stage.

  Args:
    config: with the stage's variant applied.
    stage: 'collect', 'rl', ...
    sizes: problems of the splits 'train', 'evaluated' and 'transfer'.
  """
  if stage == 'collect':
    first = min(sizes['train'], config.collect.problems)
    asked = {'core': (first, first * (1 + config.collect.max_revisions))}
    if config.teacher.name != 'scripted':
      asked['teacher'] = asked['core']
    guided = asked['core']
  elif stage == 'rl':
    members = config.rl.steps * config.rl.groups * config.rl.group_size
    alone = min(sizes['train'], config.rl.steps * config.rl.groups)
    alone *= draws_alone(config.core)
    times = 1 + config.rl.replace
    asked = {'core': (members + alone, (members + alone) * times)}
    guided = (members, members * times)
  elif stage == 'evaluate':
    systems = config.evaluate.systems
    guides = set(systems) - set(UNGUIDED)
    n, other = sizes['evaluated'], sizes['transfer']
    large = ('large_core' in systems) * (n + other)
    guided = len(guides) * (n * (1 + config.evaluate.alpha_samples) + other)
    plain = (len(systems) - len(guides)) * (n + other) - large
    asked = {'core': (guided + plain,) * 2}
    if large:
      asked['large_core'] = (large, large)
    guided = (guided, guided)
  else:
    return {}
  if config.judge.name:
    asked['judge'] = (guided[0], 2 * guided[1])  # a repair try each
  return asked


def lines(config, stage: str, name: str, ledger: Ledger | None,
          problems=None) -> list[Line]:
  """The estimate of one stage.

  Args:
    stage: its name; sft and export ask no core.
    name: what the ledger calls it; calls that it has made are taken off.
    problems: of the stage's split, where they are loaded already.
  """
  if stage not in ('collect', 'rl', 'evaluate'):
    return []
  task = make_task(config.task, config.core.shots)
  problems = problems or load_problems(
      task, config.evaluate.split if stage == 'evaluate' else 'train')
  sizes = {'train': len(problems), 'evaluated': len(problems), 'transfer': 0}
  if stage == 'evaluate' and config.evaluate.transfer:
    options, split = transfer(config)
    sizes['transfer'] = len(load_problems(
        make_task(options, config.core.shots), split))
  found = []
  for field, (calls, most) in counts(config, stage, sizes).items():
    done, mean = _history(ledger, config[field].name, name)
    calls, most = max(0, calls - done), max(0, most - done)
    price = prices.lookup(config[field], field)
    n_in = statistics.fmean(guess_input_tokens(task.core_messages(
        p, prompts.GENERIC_STRATEGY)) for p in problems[:20])
    limit = config[field].max_tokens
    usd = mean if mean is not None else price.dollars(n_in, limit / 2)
    found.append(Line(field, calls, most, calls * usd,
                      most * max(usd, price.dollars(2 * n_in, limit))))
  return found


def show(config, stage: str, workdir, problems=None) -> None:
  """Prints the estimate and the cap, if the stage asks any core."""
  name = stage_of(config, f'rl:{config.rl.output}' if stage == 'rl' else stage)
  path = path_of(config, workdir)
  ledger = Ledger(path) if path.exists() else None
  try:
    found = lines(config, stage, name, ledger, problems)
    spent = ledger.spent_usd if ledger else 0.0
  finally:
    if ledger:
      ledger.close()
  if not found:
    return
  table = Table(title=f'{name} will ask for', title_justify='left')
  for column in ('section', 'core', 'calls', 'at most', 'about $',
                 'at most $'):
    table.add_column(column, justify='left' if 'e' in column[:2] else 'right')
  for line in found:
    table.add_row(line.field, config[line.field].name, f'{line.calls:,}',
                  f'{line.most:,}', f'{line.usd:.4f}', f'{line.most_usd:.4f}')
  progress.console.print(table)
  cap = (f'budget_usd={config.budget_usd:g}' if config.budget_usd
         else 'none (set --config.budget_usd)')
  progress.console.print(f'spent so far ${spent:.4f}; cap: {cap}')


def _history(ledger, core: str, stage: str) -> tuple[int, float | None]:
  """(calls made by this stage, mean dollars of a call to this core)."""
  if ledger is None:
    return 0, None
  row = ledger.rows('SELECT COUNT(*) AS n, AVG(usd) AS mean, '
                    'COALESCE(SUM(stage = ?), 0) AS done FROM calls '
                    'WHERE core = ?', stage, core)[0]
  return row['done'], row['mean'] if row['n'] >= ENOUGH else None
