"""Teacher-guided acceptance sampling.

For each problem the teacher proposes a strategy. It is rejected if it is
malformed or gives the answer away; else the target core tries it, and it is
accepted if the core gets the problem right. A rejected teacher is told what
the core answered and what was wrong (not the reference), and tries again.

Leaves collect/proposals.jsonl, one row a proposal, and collect/summary.json.
All replies are in the ledger, so an interrupted run replays at no cost.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random

from rich.table import Table

from exectune_jax import files, progress, prompts, strategy, teachers
from exectune_jax.cores import estimate
from exectune_jax.cores.service import CoreService
from exectune_jax.episode import LOST, Episode
from exectune_jax.errors import Lost, UserError
from exectune_jax.learning import hosts
from exectune_jax.rewards.collector import Executor
from exectune_jax.tasks import load_problems, make_task


def run(config, workdir):
  """Runs the stage; see the module docstring. One process does it for all."""
  budget = hosts.budget(config, workdir, sharers=1)
  if not hosts.first():
    return
  folder = workdir / 'collect'
  if (folder / 'summary.json').exists():
    progress.console.print('collect: done before')
    return
  folder.mkdir(exist_ok=True)
  task = make_task(config.task, config.core.shots)
  problems = load_problems(task, 'train')[:config.collect.problems]
  estimate.show(config, 'collect', workdir, problems)
  with CoreService(config, workdir, 'collect', budget_usd=budget) as cores:
    executor = Executor(cores, task, config)
    teacher = make_teacher(config, cores)
    rows = cores.run(_collect(problems, executor, teacher, config, cores))
    summary = _summary(rows)
  lost = [row['fault'] for row in rows if row['status'] == LOST]
  if len(lost) > config.rl.max_lost_fraction * len(rows):
    raise UserError(f'collect: {len(lost)} of {len(rows)} proposals were lost '
                    f'({lost[0]}); mend the core and run the same command to '
                    'go on')
  files.write_whole(folder / 'proposals.jsonl',
                    ''.join(json.dumps(row) + '\n' for row in rows))
  files.write_whole(folder / 'summary.json',
                    json.dumps(summary, indent=2) + '\n')
  _show(summary)


def make_teacher(config, cores):
  if config.teacher.name == 'scripted':
    return teachers.ScriptedTeacher(config.collect.styles)
  return teachers.LLMTeacher(cores.client('teacher'), config.teacher)


def read(workdir) -> list[dict]:
  """Rows of proposals.jsonl, for the stages that follow."""
  path = workdir / 'collect' / 'proposals.jsonl'
  if not path.exists():
    raise UserError(f"stages: '{path}' is missing; run the stage collect "
                    'first')
  return [json.loads(line) for line in path.read_text().splitlines()]


async def _collect(problems, executor, teacher, config, cores):
  gate = asyncio.Semaphore(2 * config.core.concurrency)
  with progress.track('collect: problems', len(problems),
                      spent=lambda: cores.ledger.spent_usd) as advance:
    async def one(problem):
      async with gate:
        rows = await collect_problem(problem, executor, teacher,
                                     config.collect.max_revisions,
                                     config.seed)
      advance()
      return rows
    found = await asyncio.gather(*[one(p) for p in problems])
  return [row for rows in found for row in rows]


async def collect_problem(problem, executor, teacher, max_revisions: int,
                          seed: int) -> list[dict]:
  """All proposals on one problem; the last one may be accepted."""
  rng = random.Random(f'{seed}/collect/{problem.id}')
  history, rows = [], []
  for round_ in range(max_revisions + 1):
    row = {'problem': problem.id, 'question': problem.question,
           'round': round_, 'accepted': False, 'style': '', 'text': '',
           'core': None, 'status': LOST, 'fault': ''}
    rows.append(row)
    try:
      row['text'], row['style'] = await teacher.propose(problem, history, rng)
    except Lost as e:
      row['fault'] = str(e)
      break
    episode = await executor.execute(
        Episode(problem, strategy=strategy.parse(row['text'])), leaky=False)
    row.update(status='leaks' if episode.leaks else episode.status,
               accepted=episode.success and not episode.leaks,
               fault=_fault(episode))
    if episode.execution is not None:
      row['core'] = episode.execution.text
    if row['accepted'] or row['status'] == LOST:
      break
    history.append((row['text'], prompts.feedback(row['fault'], row['core'])))
  return rows


def _fault(episode) -> str:
  """What was wrong with a proposal, as its teacher is told."""
  if episode.leaks:
    return 'it gives the answer away'
  if episode.execution is None:
    return episode.lost_reason or episode.strategy.fault
  if episode.success:
    return ''
  if episode.problem.tests and episode.verdict.extracted:
    # The kind alone: what an assertion says may be the reference.
    kind = episode.verdict.extracted.partition(':')[0]
    return f'The answer is wrong ({kind})'
  return 'The answer is wrong'


def _summary(rows) -> dict:
  """Acceptance by round and by the teacher's style."""
  groups = {'round': collections.defaultdict(list),
            'style': collections.defaultdict(list)}
  for row in rows:
    if row['status'] != LOST:
      groups['round'][str(row['round'] + 1)].append(row['accepted'])
      groups['style'][row['style'] or 'llm'].append(row['accepted'])
  return {'proposals': len(rows),
          'accepted': sum(row['accepted'] for row in rows),
          'lost': sum(row['status'] == LOST for row in rows),
          **{f'by_{name}': {k: {'proposed': len(v), 'accepted': sum(v)}
                            for k, v in sorted(group.items())}
             for name, group in groups.items()}}


def _show(summary):
  table = Table(title=f'collect: {summary["accepted"]} strategies accepted of '
                f'{summary["proposals"]} proposed')
  for column in ('', 'proposed', 'accepted', 'rate'):
    table.add_column(column, justify='right' if column else 'left')
  for kind in ('round', 'style'):
    for name, c in summary[f'by_{kind}'].items():
      table.add_row(f'{kind} {name}', str(c['proposed']), str(c['accepted']),
                    f'{c["accepted"] / c["proposed"]:.1%}')
  progress.console.print(table)
