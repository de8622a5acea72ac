"""The guide at work for a server: strategies for problems as they come.

The main thread drives the accelerator, as everywhere: `run` decodes chunk
after chunk, and problems that arrive meanwhile take the next free slots
(continuous batching). The event loop awaits `write`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import queue
import sys
import time
from collections.abc import Callable

from exectune_jax.episode import Problem, Strategy
from exectune_jax.models.guide import Guide
from exectune_jax.sampling.grid import padded


class GuideError(Exception):
  """No strategy; the text says why, in few words."""


@dataclasses.dataclass(frozen=True)
class _Ticket:
  """One problem on its way. prompt: None says to forget it."""
  number: int
  prompt: list[int] | None
  future: asyncio.Future | None


class Engine:
  """Writes greedy strategies with one guide.

  Args:
    guide, sampler: of the same model.
    variables: the guide's weights.
    slots: problems decoded at a time.
  """

  def __init__(self, guide: Guide, sampler, variables, slots: int):
    self.guide, self.slots = guide, slots
    self._new_grid = functools.partial(
        sampler.grid, sampler.prepare(variables), slots, 1,
        guide.max_prompt_tokens, seed=0, temperature=0.0)
    self._width = padded(guide.max_prompt_tokens)
    self._inbox: queue.SimpleQueue[_Ticket] = queue.SimpleQueue()
    self._open: dict[int, _Ticket] = {}
    self._numbers = itertools.count()
    self._grid = None

  async def write(self, problem: Problem) -> tuple[Strategy, int]:
    """The guide's strategy, and how many tokens were read and written for it;
    cancelling it frees the slot.

    Raises:
      GuideError: the problem does not fit, or the guide failed.
    """
    # A token is rarely longer than eight characters; don't tokenize books.
    limit = self.guide.max_prompt_tokens
    prompt = (self.guide.whole_prompt(problem)
              if len(problem.question) <= 8 * limit else None)
    if prompt is None or len(prompt) > limit:
      raise GuideError('too long')
    loop = asyncio.get_running_loop()
    ticket = _Ticket(next(self._numbers), prompt, loop.create_future())
    self._inbox.put(ticket)
    try:
      strategy = await ticket.future
      return strategy, len(prompt) + len(strategy.tokens)
    except asyncio.CancelledError:
      self._inbox.put(_Ticket(ticket.number, None, None))
      raise

  def warm_up(self) -> None:
    """Compiles what `run` will need: a prefill for each number of problems
    that can arrive together."""
    grid = self._new_grid()
    rows = 1
    while True:
      for row in range(min(rows, self.slots)):
        grid.add(row, [1], 0, self._width)
      grid.step()
      for row in range(rows):
        grid.drop(row)
      if rows >= self.slots:
        break
      rows *= 2
    self._grid = grid

  def run(self, going: Callable[[], bool]) -> None:
    """Decodes until `going` says no; main thread."""
    while going():
      try:
        if self._grid is None:
          self._grid = self._new_grid()
        self._admit()
        if self._grid.busy:
          self._step()
      except Exception as e:  # noqa: BLE001 whatever an accelerator can do
        self._fail(e)

  def _step(self) -> None:
    for sample in self._grid.step():
      strategy = self.guide.read(sample.tokens, sample.logprobs,
                                 sample.complete)
      _settle(self._open.pop(sample.row).future, strategy)

  def _admit(self) -> None:
    """Takes what has arrived; waits for it if there is nothing else to do."""
    try:
      wait = not self._grid.busy
      while True:
        ticket = self._inbox.get(timeout=0.1) if wait else (
            self._inbox.get_nowait())
        wait = False
        if ticket.prompt is None:
          if self._open.pop(ticket.number, None):
            self._grid.drop(ticket.number)
        else:
          self._open[ticket.number] = ticket
          self._grid.add(ticket.number, ticket.prompt, 0, self._width)
    except queue.Empty:
      pass

  def _fail(self, error: Exception) -> None:
    """Gives everybody up and says so; `run` then begins with an empty grid.

    The old one goes first: a device may not hold two.
    """
    self._grid = None
    print(f'error: the guide failed: {type(error).__name__}: '
          f'{str(error)[:300]}; the core answers alone', file=sys.stderr,
          flush=True)
    while not self._inbox.empty():  # they would wait for nothing
      ticket = self._inbox.get_nowait()
      self._open[ticket.number] = ticket
    for ticket in self._open.values():
      if ticket.future:
        _settle(ticket.future, GuideError('guide failed'))
    self._open.clear()
    time.sleep(0.1)  # what fails at once must not fail all the time


def _settle(future: asyncio.Future, result) -> None:
  """Ends a future of another thread's loop, unless it was given up."""
  def settle():
    if future.done():
      return
    if isinstance(result, Exception):
      future.set_exception(result)
    else:
      future.set_result(result)
  future.get_loop().call_soon_threadsafe(settle)
