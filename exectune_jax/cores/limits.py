"""How much a provider is asked at once, and how much a minute."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time


class Concurrency:
  """At most `limit` at once; the limit finds what the provider can bear.

  It doubles with every round of replies until the provider first says that
  it has too much to do, then grows by one a round and is cut by 0.7 at every
  such complaint (additive increase, multiplicative decrease: Chiu and Jain,
  1989). Lives on one event loop; everything that uses one provider shares it.

  Args:
    low, high: bounds of the limit.
    start: its first value.
  """

  def __init__(self, low: int, high: int, start: int = 16):
    self.low, self.high = min(low, high), high
    self.limit = float(min(max(start, low), high))
    self.busy = 0
    self.cuts = 0
    self._growing_fast = True
    self._paused_until = 0.0
    self._waiting: collections.deque[asyncio.Future] = collections.deque()

  def widen(self, low: int, high: int) -> None:
    """Takes in another user's bounds: the widest are kept."""
    self.low, self.high = min(self.low, low), max(self.high, high)

  @contextlib.asynccontextmanager
  async def slot(self, urgent: bool = False):
    """Waits for a place; `urgent` ones, which wait again, go first."""
    if self._waiting or not self._free():
      turn = asyncio.get_running_loop().create_future()
      self._wake_after_pause()
      (self._waiting.appendleft if urgent else self._waiting.append)(turn)
      try:
        await turn
      except asyncio.CancelledError:
        if turn.done() and not turn.cancelled():
          self._leave()  # given a place in the very moment
        raise
    else:
      self.busy += 1
    try:
      yield
    finally:
      self._leave()

  def succeeded(self) -> None:
    """A reply came."""
    if self.busy >= int(self.limit) - 1:  # else the limit was not the limit
      step = 1.0 if self._growing_fast else 1.0 / self.limit
      self.limit = min(self.limit + step, self.high)

  def overloaded(self, retry_after_s: float | None, latency_s: float) -> None:
    """The provider complained; of one round's complaints one counts.

    Nobody starts for as long as the provider said, or as the complaint took:
    else those who wait would take the refused one's place and be refused.
    """
    now = time.monotonic()
    if now >= self._paused_until:
      self.limit = max(self.low, self.limit * 0.7)
      self._growing_fast = False
      self.cuts += 1
    pause = max(0.05, min(latency_s, 1.0) if retry_after_s is None
                else retry_after_s)
    self._paused_until = max(self._paused_until, now + pause)
    if self._waiting:
      self._wake_after_pause()

  def _free(self) -> bool:
    return (self.busy < int(self.limit)
            and time.monotonic() >= self._paused_until)

  def _wake_after_pause(self) -> None:
    pause = self._paused_until - time.monotonic()
    if pause > 0:
      asyncio.get_running_loop().call_later(pause + 0.001, self._wake)

  def _leave(self) -> None:
    self.busy -= 1
    self._wake()

  def _wake(self) -> None:
    while self._waiting and self._free():
      turn = self._waiting.popleft()
      if not turn.done():
        self.busy += 1
        turn.set_result(None)


class Bucket:
  """Lets `per_minute` units through a minute, at most a minute's at once."""

  def __init__(self, per_minute: float):
    self.capacity = self.level = float(per_minute)
    self._seen = time.monotonic()
    self._turn = asyncio.Lock()

  async def take(self, units: float) -> float:
    """Waits for units, in order of arrival; returns how many were taken."""
    units = min(units, self.capacity)
    async with self._turn:
      while True:
        now = time.monotonic()
        self._add((now - self._seen) * self.capacity / 60)
        self._seen = now
        if self.level >= units:
          self.level -= units
          return units
        await asyncio.sleep((units - self.level) * 60 / self.capacity)

  def correct(self, taken: float, used: float) -> None:
    """Settles a reservation: what was not used comes back."""
    self._add(taken - used)

  def _add(self, units: float) -> None:
    self.level = min(self.level + units, self.capacity)
