"""Adaptive concurrency and token buckets, against closed forms and a
provider of limited capacity."""

import asyncio
import itertools
import types

import pytest

from exectune_jax.cores import limits
from exectune_jax.cores.limits import Bucket, Concurrency


class Clock(asyncio.SelectorEventLoop):
  """An event loop in which waiting takes no time and time is exact."""

  now = 1000.0

  def time(self):
    return self.now

  def _run_once(self):
    if not self._ready and self._scheduled:
      self.now = max(self.now + 1e-9, self._scheduled[0].when())
    super()._run_once()


@pytest.fixture
def simulate(monkeypatch):
  """simulate(f): the result of the coroutine f(clock) in simulated time."""
  def run(work):
    with asyncio.Runner(loop_factory=Clock) as runner:
      now = runner.get_loop().time
      monkeypatch.setattr(limits, 'time', types.SimpleNamespace(monotonic=now))
      return runner.run(work(now))
  return run


def test_it_doubles_a_round_then_grows_by_one_a_round():
  limit = Concurrency(1, 100, start=4)
  for _ in range(4):  # one round, with the freed places taken at once
    limit.busy = int(limit.limit)
    limit.succeeded()
  assert limit.limit == 8
  limit.busy = 8
  limit.overloaded(None, 1.0)
  assert limit.limit == pytest.approx(5.6)
  limit.busy = 5
  expected = 5.6
  for _ in range(5):  # one round
    limit.busy = int(limit.limit)
    limit.succeeded()
    expected += 1 / expected
  assert limit.limit == pytest.approx(expected)
  assert 6.4 < limit.limit < 6.6


def test_it_stays_within_its_bounds():
  limit = Concurrency(3, 6, start=16)
  assert limit.limit == 6
  for _ in range(20):
    limit._paused_until = 0.0
    limit.overloaded(None, 0.0)
  assert limit.limit == 3
  limit.busy = 3
  for _ in range(100):
    limit.busy = int(limit.limit)
    limit.succeeded()
  assert limit.limit == 6


def test_an_idle_limit_does_not_grow():
  limit = Concurrency(1, 100, start=10)
  limit.busy = 2
  limit.succeeded()
  assert limit.limit == 10


def test_complaints_of_one_round_count_once():
  limit = Concurrency(1, 100, start=16)
  for _ in range(16):
    limit.overloaded(None, 30.0)
  assert limit.limit == pytest.approx(11.2)
  assert limit.cuts == 1


def test_retry_after_holds_everybody(simulate):
  async def run(now):
    limit = Concurrency(1, 4, start=4)
    limit.overloaded(0.2, 1.0)
    began = now()
    async def one():
      async with limit.slot():
        return now() - began
    return await asyncio.gather(*[one() for _ in range(2)])
  assert simulate(run) == pytest.approx([0.201] * 2)


def test_urgent_ones_go_first_and_cancelled_ones_leave_no_hole():
  async def run():
    limit, order = Concurrency(1, 1), []
    async def one(name, urgent=False):
      async with limit.slot(urgent):
        order.append(name)
        await asyncio.sleep(0.01)
    tasks = [asyncio.create_task(one(n)) for n in 'abc']
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(one('retry', True)))
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert limit.busy == 0
    return order
  assert asyncio.run(run()) == ['a', 'retry', 'c']


def test_it_finds_a_providers_capacity(simulate):
  """A provider that bears 10 at once, and says so above that."""
  async def run(now):
    limit, flying, seen = Concurrency(1, 200, start=4), 0, []
    async def call():
      nonlocal flying
      while True:
        async with limit.slot():
          flying += 1
          seen.append(flying)
          over = flying > 10
          await asyncio.sleep(0.001 if over else 0.01)
          flying -= 1
          if not over:
            limit.succeeded()
            return
          limit.overloaded(None, 0.01)
        await asyncio.sleep(0.02)  # a client's backoff
    began = now()
    await asyncio.gather(*[call() for _ in range(600)])
    return now() - began, seen
  seconds, seen = simulate(run)
  refused = sum(n > 10 for n in seen)
  assert refused < 0.25 * len(seen)
  # 600 calls, 10 at a time, 10 ms each: 0.6 s if the limit were known.
  assert seconds < 3.0
  late = seen[len(seen) // 2:]
  assert max(late) <= 13


def test_a_bucket_gives_a_minutes_worth_and_then_waits(simulate):
  async def run(now):
    times, bucket = [now()], Bucket(6000)
    assert await bucket.take(6000) == 6000
    times.append(now())
    await bucket.take(30)  # 100 a second
    times.append(now())
    bucket.correct(taken=50, used=10)  # forty come back
    await bucket.take(35)
    times.append(now())
    return [b - a for a, b in itertools.pairwise(times)]
  assert simulate(run) == pytest.approx([0.0, 0.3, 0.0])


def test_a_request_larger_than_a_minutes_worth_passes():
  async def run():
    return await asyncio.wait_for(Bucket(100).take(5000), 1)
  assert asyncio.run(run()) == 100
