"""From strategies to scored episodes, on the cores' event loop.

`Executor` takes one episode through core and grader. `Collector` keeps the
groups of an RL run: strategies go in one by one as they are decoded, whole
groups come out, members ordered by index whatever the order of arrival.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import statistics
import time

from exectune_jax import interrupt
from exectune_jax.cores.base import CoreRequest, draws_alone
from exectune_jax.episode import (LOST, MALFORMED, Episode, Problem, Strategy,
                                  Verdict)
from exectune_jax.errors import Lost
from exectune_jax.rewards import executability, judge


class Executor:
  """Runs episodes against the core that a config section names.

  Args:
    service: CoreService.
    task: the Task.
    config: the whole config.
    field: which core.
  """

  def __init__(self, service, task, config, field: str = 'core'):
    self.task, self.settings = task, config[field]
    task.check()
    self.client = service.client(field)
    self.graders = service.graders(config.task, config.core.shots)
    self.judge_settings = config.judge
    self.judge_client = (service.client('judge') if config.judge.name
                         else None)

  async def execute(self, episode: Episode, sample: int = 0,
                    leaky: bool = True) -> Episode:
    """Fills execution, verdict, leaks, judge and status. Never raises Lost.

    Args:
      episode: with problem, and a strategy or None for the core alone.
      sample: number of this draw (see CoreRequest).
      leaky: whether the core is asked even if the strategy gives the answer
        away.
    """
    problem, strategy = episode.problem, episode.strategy
    if strategy is not None and strategy.body is None:
      return dataclasses.replace(episode, status=MALFORMED)
    try:
      body = strategy.body if strategy is not None else None
      if body is not None:
        episode = await self._inspect(episode, problem, body)
        if episode.leaks and not leaky:
          return episode
      request = CoreRequest.build(
          self.settings, self.task.core_messages(problem, body), sample)
      reply = await self.client.call(request)
      if reply.finish == 'stop':
        verdict = await self.graders.verify(problem, reply.text)
      else:  # truncated or refused: an answer, and a wrong one
        verdict = Verdict(False)
    except Lost as e:
      return dataclasses.replace(episode, status=LOST, lost_reason=str(e))
    return dataclasses.replace(episode, execution=reply, verdict=verdict)

  async def _inspect(self, episode, problem, body):
    leaks = await self.graders.reveals_answer(problem, body)
    quality = None
    if self.judge_client is not None:
      quality, judged = await judge.judge(
          self.judge_client, self.judge_settings, problem.question, body)
      leaks = leaks or judged
    return dataclasses.replace(episode, leaks=leaks, judge=quality)

  async def alone(self, problem: Problem) -> tuple[float, float]:
    """(mean success, mean dollars) of the core alone.

    Raises:
      Lost: a draw is not known. All `samples_alone` must be, as any other
        subset would depend on which calls happened to fail.
    """
    done = await asyncio.gather(*[
        self.execute(Episode(problem), i)
        for i in range(draws_alone(self.settings))])
    for e in done:
      if e.status == LOST:
        raise Lost(f'core alone: {e.lost_reason}')
    return (statistics.fmean(e.success for e in done),
            statistics.fmean(e.execution.usd for e in done))


@dataclasses.dataclass
class _Group:
  number: int
  problem: Problem
  version: int
  opened: float
  alone: concurrent.futures.Future
  members: dict[int, tuple[Strategy, concurrent.futures.Future]]
  finished: float = 0.0  # when the last of the futures so far was done

  def watch(self, future):
    def note(_):
      self.finished = time.monotonic()
    future.add_done_callback(note)
    return future


class Collector:
  """Groups in flight: bounded by who admits them, never dropped.

  Args:
    service, task, config: as for Executor.
  """

  def __init__(self, service, task, config):
    self.service, self.config = service, config
    self.executor = Executor(service, task, config)
    self._groups: dict[int, _Group] = {}

  def open(self, number: int, problem: Problem, version: int) -> None:
    """Starts a group; the core alone is asked at once."""
    alone = self.service.submit(self.executor.alone(problem))
    group = _Group(number, problem, version, time.monotonic(), alone, {})
    group.watch(alone)
    self._groups[number] = group

  def add(self, number: int, index: int, strategy: Strategy) -> None:
    """Sends one member's strategy to the core."""
    group = self._groups[number]
    episode = Episode(group.problem, number, index, group.version, strategy)
    draw = number * self.config.rl.group_size + index
    group.opened = time.monotonic()  # the deadline is the core's, not ours
    group.members[index] = (strategy, group.watch(self.service.submit(
        self.executor.execute(episode, draw))))

  def seconds(self, groups: list[list[Episode]]) -> float:
    """The longest that core and graders took for one of these groups, from
    its last strategy to its last reward."""
    found = [self._groups[g[0].group] for g in groups]
    return max((max(0.0, g.finished - g.opened) for g in found), default=0.0)

  def drop(self, groups: list[list[Episode]]) -> None:
    """Forgets groups: an update has been made of them, or never will be."""
    for group in groups:
      del self._groups[group[0].group]

  def pending(self) -> list[dict]:
    """Groups that no update was made of, as plain data for a checkpoint."""
    return [{'number': g.number, 'version': g.version,
             'members': [dataclasses.asdict(g.members[i][0])
                         for i in sorted(g.members)]}
            for g in map(self._groups.get, self._order())
            if len(g.members) == self.config.rl.group_size]

  def restore(self, data: dict, problem: Problem) -> None:
    """Puts a pending group back; its paid calls come from the ledger."""
    self.open(data['number'], problem, data['version'])
    for index, member in enumerate(data['members']):
      self.add(data['number'], index, Strategy(**{
          **member, 'tokens': tuple(member['tokens']),
          'logprobs': tuple(member['logprobs'])}))

  def take(self, count: int, version: int) -> list[list[Episode]]:
    """Waits for `count` groups and returns them scored, in group order.

    In deterministic mode these are the oldest groups, one that replaces
    another being as old as that one. Otherwise they are those that would be
    too stale after this update, then the first to complete. They stay pending
    until `drop`.

    Raises:
      Stopped: a signal came while waiting; the groups stay pending.
    """
    while True:
      chosen = self._choose(count, version)
      if chosen is not None:
        return [self._finish(self._groups[n]) for n in self._order()
                if n in chosen]
      interrupt.check()
      time.sleep(0.002)

  def _choose(self, count, version):
    """Numbers of the groups to train on now, or None while waiting."""
    rl = self.config.rl
    order = self._order()
    if rl.deterministic:
      wanted = order[:count]
      return wanted if all(self._done(n) for n in wanted) else None
    # After this step only k * count groups can be trained up to k steps from
    # now. Of those due by then, the others must be among today's.
    chosen = []
    for k in range(rl.max_staleness + 1):
      within = [n for n in order
                if self._groups[n].version + rl.max_staleness <= version + k]
      ready = [n for n in within if n not in chosen and self._done(n)]
      need = len(within) - k * count - len(chosen)
      if need > len(ready):
        return None
      chosen += ready[:max(0, need)]
    chosen += [n for n in order
               if n not in chosen and self._done(n)][:count - len(chosen)]
    return chosen[:count] if len(chosen) >= count else None

  def _order(self) -> list[int]:
    """Numbers of all groups by their places in the run."""
    places = self.config.rl.steps * self.config.rl.groups
    return sorted(self._groups, key=lambda n: (n % places, n))

  def _done(self, number) -> bool:
    group = self._groups[number]
    futures = [group.alone, *(f for _, f in group.members.values())]
    if time.monotonic() - group.opened > self.config.rl.deadline_s:
      for future in futures:  # stragglers are lost
        future.cancel()
    return all(f.done() for f in futures)

  def _finish(self, group: _Group) -> list[Episode]:
    alone, reason = None, 'rl.deadline_s'
    if not group.alone.cancelled():
      try:
        alone = group.alone.result()
      except Lost as e:
        reason = str(e)
    episodes = []
    for index in sorted(group.members):
      strategy, future = group.members[index]
      if future.cancelled():
        episode = Episode(group.problem, group.number, index, group.version,
                          strategy, status=LOST, lost_reason='rl.deadline_s')
      else:
        episode = future.result()
      if alone is None:  # without a base nobody knows what was degraded
        episode = dataclasses.replace(episode, status=LOST,
                                      lost_reason=reason)
      else:
        episode = dataclasses.replace(episode, base=alone[0],
                                      base_usd=alone[1])
      episodes.append(episode)
    return executability.score_group(
        episodes, self.config.reward, self.config.rl.reward,
        self.config.guide.usd_per_1m_tokens / 1e6)
