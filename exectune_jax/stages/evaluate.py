"""Every system on the same held-out problems, paired.

Systems: core_alone; step_by_step and generic (one fixed text as strategy);
base, sft, advisor, exectune (any folder of guides/); large_core alone. All
share core parameters and worked examples. Guides decode greedily for
accuracy, and at temperature 1 for executability.

Leaves report.json, report.html, frontier.png and evaluate/*.jsonl.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json

from exectune_jax import files, interrupt, progress, prompts
from exectune_jax.config import UNGUIDED
from exectune_jax.cores import estimate
from exectune_jax.cores.service import CoreService
from exectune_jax.episode import (LOST, Episode, Strategy, from_dict, to_dict)
from exectune_jax.errors import UserError
from exectune_jax.learning import hosts
from exectune_jax.learning.checkpoint import Checkpoints
from exectune_jax.learning.learner import Learner
from exectune_jax.report import page, summary
from exectune_jax.rewards.collector import Executor
from exectune_jax.tasks import load_problems, make_task, transfer

FIXED = {'generic': prompts.GENERIC_STRATEGY,
         'step_by_step': prompts.STEP_BY_STEP}


def run(config, workdir):
  """Runs the stage; see the module docstring."""
  systems = config.evaluate.systems
  if 'core_alone' not in systems:
    raise UserError(f'evaluate.systems={tuple(systems)}: needs core_alone, '
                    'which the others are compared with')
  if 'large_core' in systems and not config.large_core.name:
    raise UserError("large_core.name='': name the core that evaluate.systems "
                    'asks for')
  if config.evaluate.split not in ('train', 'validation', 'test'):
    raise UserError(f"evaluate.split='{config.evaluate.split}': choose from "
                    'train, validation, test')
  estimate.show(config, 'evaluate', workdir)
  learner = None
  if set(systems) - set(UNGUIDED):
    learner = Learner(config, workdir, config.rl)
  budget = hosts.budget(config, workdir, sharers=1)
  with CoreService(config, workdir, 'evaluate', hosts.index(),
                   budget) as cores:
    folder = workdir / 'evaluate'
    results = [_task_report(config, config.evaluate.split, learner, cores,
                            folder)]
    if config.evaluate.transfer:
      if hosts.first():
        _publish(results, config, workdir)  # in case the second one fails
      other, split = _transfer(config)
      results.append(_task_report(other, split, learner, cores,
                                  folder / 'transfer'))
  if hosts.first():
    _publish(results, config, workdir)


def _task_report(config, split, learner, cores, folder):
  """(report, episodes of every system) for one task."""
  folder.mkdir(exist_ok=True)
  task_name = config.task.name.replace(':', '.')
  task = make_task(config.task, config.core.shots)
  problems = load_problems(task, split)
  greedy, sampled, lengths = {}, {}, {}
  for name in config.evaluate.systems:
    stamp = _stamp(name, learner, config.evaluate)
    draws = [('greedy', 1, 0.0)]
    if name not in UNGUIDED and config.evaluate.alpha_samples:
      draws.append(('sampled', config.evaluate.alpha_samples, 1.0))
    for kind, count, temperature in draws:
      path = folder / f'{task_name}_{name}_{kind}.jsonl'
      episodes = _attempts(name, problems, count, temperature, learner, cores,
                           config, path, stamp)
      if not hosts.first():  # the first process asks the core for all
        continue
      field = 'large_core' if name == 'large_core' else 'core'
      executor = Executor(cores, task, config, field)
      done = cores.run(_execute(f'{name}, {kind}', episodes, executor, cores))
      _check_lost(name, done, config)
      files.write_whole(path, ''.join(json.dumps(row) + '\n' for row in [
          stamp, *map(to_dict, done)]))
      (greedy if kind == 'greedy' else sampled)[name] = done
    if name not in UNGUIDED and hosts.first():
      lengths[name] = [len(learner.guide.prompt(p)) for p in problems]
  if not hosts.first():
    return None, {}
  report = summary.summarise(
      config.task.name, config.core.name, greedy, sampled, lengths,
      config.guide.usd_per_1m_tokens / 1e6)
  return report, greedy


def _attempts(name, problems, count, temperature, learner, cores, config,
              path, stamp):
  """Episodes with strategies, not yet executed; reused if still current."""
  if name in UNGUIDED:
    body = FIXED.get(name)
    strategy = Strategy(body, body) if body else None
    return [Episode(p, strategy=strategy) for p in problems]
  held = _read(path, stamp)
  if [(e.problem, e.index) for e in held] == [
      (p, i) for p in problems for i in range(count)]:
    return [Episode(e.problem, index=e.index, strategy=e.strategy)
            for e in held]
  guide, variables = learner.guide, learner.weights(name, 'evaluate.systems')
  interrupt.check(hosts.agree(interrupt.requested()))
  found = {}
  with progress.track(f'{name}: strategies', len(problems) * count,
                      spent=lambda: cores.ledger.spent_usd) as advance:
    for s in learner.sampler.sample(
        variables, [guide.prompt(p) for p in problems], range(len(problems)),
        count, seed=config.seed, temperature=temperature,
        top_k=config.evaluate.top_k, top_p=config.evaluate.top_p,
        slots=min(config.evaluate.batch_size, len(problems))):
      found[s.row, s.index] = guide.read(s.tokens, s.logprobs, s.complete)
      advance()
      interrupt.check()
  return [Episode(problem, index=i, strategy=found[row, i])
          for row, problem in enumerate(problems) for i in range(count)]


async def _execute(title, episodes, executor, cores):
  """All episodes through core and grader, in order."""
  with progress.track(title, len(episodes),
                      spent=lambda: cores.ledger.spent_usd) as advance:
    async def one(episode):
      done = await executor.execute(episode, episode.index)
      advance()
      return done
    return await asyncio.gather(*[one(e) for e in episodes])


def _check_lost(name, episodes, config):
  """A system of which too much is unknown must not appear as a number."""
  lost = [e for e in episodes if e.status == LOST]
  if len(lost) > config.rl.max_lost_fraction * len(episodes):
    raise UserError(f'evaluate: {len(lost)} of {len(episodes)} episodes of '
                    f'{name} were lost ({lost[0].lost_reason}); mend the core '
                    'and run the same command to go on')


def _transfer(config):
  """The same systems on a task that was never trained on; greedy only."""
  other = config.copy_and_resolve_references()
  other.task, split = transfer(config)
  other.evaluate.alpha_samples = 0
  return other, split


def _stamp(name, learner, options) -> dict:
  """From which weights, and how, the strategies of a file were drawn."""
  if name in UNGUIDED:
    return {'guide': None}
  checkpoints = Checkpoints(learner.workdir / 'guides' / name)
  step = checkpoints.latest()
  checkpoints.close()
  return {'guide': name, 'step': step, 'top_k': options.top_k,
          'top_p': options.top_p}


def _read(path, stamp) -> list[Episode]:
  if not path.exists():
    return []
  try:
    first, *rows = (json.loads(x) for x in path.read_text().splitlines())
    return [from_dict(row) for row in rows] if first == stamp else []
  except (ValueError, KeyError, TypeError):  # damaged: sample again
    return []


def _publish(results, config, workdir):
  """Writes the report files and prints the tables."""
  reports = [report for report, _ in results]
  whole = dict(reports[0])
  if len(reports) > 1:
    whole['transfer'] = reports[1]
  (workdir / 'report.json').write_text(json.dumps(whole, indent=2) + '\n')
  figure = page.frontier(reports)
  figure.savefig(workdir / 'frontier.png', dpi=120)
  last = config.evaluate.systems[-1]
  shown = [dataclasses.replace(e, base=float(alone.success))
           for e, alone in zip(results[0][1][last], results[0][1]['core_alone'],
                               strict=True) if e.status != LOST]
  (workdir / 'report.html').write_text(page.page(
      reports, {last: shown[:20]}, figure, str(config)))
  for e in shown[:config.evaluate.show_episodes]:
    progress.show_episode(e, f'[{last}]')
  for report in reports:
    for table in page.tables(report):
      progress.console.print(table)
  progress.console.print(f'written: {workdir}/report.json, report.html, '
                         'frontier.png')
