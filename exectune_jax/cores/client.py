"""What stands between a request and an adapter.

Ledger first, then one flight per request, budget, rate and concurrency
limits, retries with jitter under a deadline. A call returns a reply that is
already in the ledger, or raises Lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import Callable

from exectune_jax.cores import base
from exectune_jax.cores.base import Core, CoreReply, CoreRequest
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores.limits import Bucket, Concurrency
from exectune_jax.errors import Lost, UserError


OnText = Callable[[str], None]


@dataclasses.dataclass
class _Flight:
  """A request on its way. waiters: who would take its reply."""
  task: asyncio.Task
  pieces: _Pieces
  waiters: int = 0


class _Elsewhere(Exception):  # noqa: N818
  """Another client or process is at this very call."""


class _Pieces:
  """Where the pieces of one reply go, and whether any has come."""

  def __init__(self, on_text: OnText | None):
    self.on_text, self.begun = on_text, False

  async def from_core(self, core: Core, request: CoreRequest) -> CoreReply:
    try:
      if self.on_text is None or not hasattr(core, 'stream'):
        return await core.generate(request)
      return await core.stream(request, self._come)
    except base.BlockedError:
      return CoreReply('', 'refused', 0, 0, 0.0, 0.0)

  def _come(self, piece: str) -> None:
    if piece:
      self.begun = True
      self.on_text(piece)


class CoreClient:
  """One core as everybody uses it. Lives on one event loop.

  Args:
    core: the adapter.
    ledger: where replies are kept.
    settings: a core section of the config (attempts, timeout_s for one try,
      deadline_s for all, requests_per_minute, tokens_per_minute).
    stage: written beside each reply, for the bill.
    field: the config section's name, for error messages.
    limit: shared by all clients of a provider.
    run: name of this run, where several share the ledger.
  """

  def __init__(self, core: Core, ledger: Ledger, settings, stage: str,
               field: str = 'core', limit: Concurrency | None = None,
               run: str = ''):
    self.core, self.ledger, self.settings = core, ledger, settings
    self.stage, self.field, self.run = stage, field, run
    self.limit = limit or Concurrency(settings.min_concurrency,
                                      settings.concurrency)
    most = settings.concurrency
    self._gate = Concurrency(most, most, start=most)
    self._flying: dict[str, _Flight] = {}
    self._paying: set[str] = set()  # past the queue: at the core now
    self._requests, self._tokens = (
        Bucket(n) if n else None
        for n in (settings.requests_per_minute, settings.tokens_per_minute))
    self._answered = False
    self._closing = False

  async def call(self, request: CoreRequest,
                 on_text: OnText | None = None) -> CoreReply:
    """The reply to `request`, from the ledger or the core.

    Args:
      on_text: called with pieces of the reply as they come, where the core
        can do that and nobody else has the same request in flight. After the
        first piece there are no more tries.

    Raises:
      Lost: no answer after all retries, or the deadline passed.
      UserError: no request can succeed (key, model, address, budget).
    """
    reply, _ = await self.ask(request, on_text)
    return reply

  async def ask(self, request: CoreRequest, on_text: OnText | None = None
                ) -> tuple[CoreReply, bool]:
    """`call`, and whether this caller is the one who paid."""
    key = request.key(self.core.name)
    while True:
      reply = self.ledger.get(key)
      if reply is not None:
        if self.run:
          self.ledger.reuse(key, self.run)
        return reply, False
      flight = self._flying.get(key)
      ours = flight is None
      if ours:
        flight = self._take_off(key, request, _Pieces(on_text))
      try:
        return await self._wait(key, flight), ours
      except Lost:
        # Another's stream broke off; ours may have all its tries.
        if ours or not flight.pieces.begun:
          raise

  def _take_off(self, key: str, request: CoreRequest,
                pieces: _Pieces) -> _Flight:
    task = asyncio.create_task(self._fly(key, request, pieces))
    task.add_done_callback(lambda t: self._land(key, t))
    self._flying[key] = _Flight(task, pieces)
    return self._flying[key]

  async def _wait(self, key: str, flight: _Flight) -> CoreReply:
    """The flight's reply. A waiter that gives up must not lose a reply that
    we pay for; what nobody waits for any more is not bought."""
    flight.waiters += 1
    try:
      return await asyncio.shield(flight.task)
    finally:
      flight.waiters -= 1
      if not flight.waiters and key not in self._paying:
        flight.task.cancel()

  def _land(self, key: str, task: asyncio.Task) -> None:
    self._flying.pop(key, None)
    if not task.cancelled():
      task.exception()  # seen, even if every waiter has given up

  async def _fly(self, key: str, request: CoreRequest,
                 pieces: _Pieces) -> CoreReply:
    while True:
      try:
        return await self._with_retries(key, request, pieces)
      except _Elsewhere:
        await asyncio.sleep(0.1)
      reply = self.ledger.get(key)
      if reply is not None:
        return reply

  async def _with_retries(self, key, request, pieces) -> CoreReply:
    s, error = self.settings, None
    try:
      async with asyncio.timeout(None) as clock:  # runs from the first try
        for attempt in range(1, s.attempts + 1):
          try:
            reply = await self._once(key, request, clock, pieces)
            break
          except base.RetryableError as e:
            pause, error = _pause(e, attempt), e
            if pause > s.deadline_s:  # a daily quota, say: nothing goes on
              raise UserError(
                  f"{self.field}.name='{self.core.name}': {e}; it asks to wait "
                  f'{pause:.0f} s, longer than {self.field}.deadline_s='
                  f'{s.deadline_s:g}; run the same command then') from e
            late = asyncio.get_running_loop().time() + pause > clock.when()
            if attempt == s.attempts or pieces.begun or late:
              raise
            await asyncio.sleep(pause)
    except base.FatalError as e:
      raise UserError(f"{self.field}.name='{self.core.name}': {e}; check the "
                      'model name and the API key in the environment') from e
    except base.UnreachableError as e:
      if not self._answered:
        raise UserError(f"{self.field}.name='{self.core.name}': {e}; start "
                        'the server or mend the address') from e
      raise Lost(str(e)) from e
    except (base.RetryableError, base.RequestError) as e:
      raise Lost(str(e)) from e
    except TimeoutError as e:
      raise Lost(f'{self.core.name}: deadline_s={s.deadline_s:g} passed'
                 + (f'; before that: {error}' if error else '')) from e
    self._answered = True
    return reply

  async def _once(self, key, request, clock: asyncio.Timeout,
                  pieces) -> CoreReply:
    """One try, from the queue to the ledger."""
    urgent = clock.when() is not None
    # Whoever waits for a rate keeps no other client from the provider; and no
    # more wait for it than could be sent, so that retries are soon next.
    async with (self._gate.slot(urgent), contextlib.AsyncExitStack() as place):
      reserved = await self._reserve(request)
      try:
        await place.enter_async_context(self.limit.slot(urgent))
        if not urgent:
          clock.reschedule(asyncio.get_running_loop().time()
                           + self.settings.deadline_s)
        if self._closing:  # queued behind a stop: buy nothing more
          raise base.RequestError('stopped')
        self._begin(key, request)
      except BaseException:
        self._give_back(*reserved)
        raise
      reply = await self._at_core(key, request, pieces)
      if self._tokens:
        self._tokens.correct(reserved[1],
                             reply.input_tokens + reply.output_tokens)
      return reply

  async def _reserve(self, request) -> tuple[float, float]:
    """Waits until the rates allow one more; returns requests and tokens."""
    requests = await self._requests.take(1) if self._requests else 0.0
    if not self._tokens:
      return requests, 0.0
    try:
      return requests, await self._tokens.take(
          base.guess_input_tokens(request.messages) + request.max_tokens)
    except BaseException:
      self._give_back(requests, 0.0)
      raise

  def _give_back(self, requests: float, tokens: float) -> None:
    if self._requests:
      self._requests.correct(requests, 0)
    if self._tokens:
      self._tokens.correct(tokens, 0)

  def _begin(self, key, request) -> None:
    worst = self.core.price.dollars(_token_bound(request), request.max_tokens)
    if not self.ledger.begin(key, self.core.name, self.stage, worst):
      raise _Elsewhere
    self._paying.add(key)

  async def _at_core(self, key, request, pieces) -> CoreReply:
    """The paid part: ends in the ledger, whatever happens."""
    began = time.monotonic()
    try:
      try:
        async with asyncio.timeout(self.settings.timeout_s):
          reply = await pieces.from_core(self.core, request)
      except TimeoutError as e:
        raise base.RetryableError(
            f'{self.core.name}: no reply in {self.settings.timeout_s:g} s'
        ) from e
    except BaseException as e:
      rejected = isinstance(e, (base.RequestError, base.FatalError))
      self.ledger.fail(key, self.core.name, self.stage,
                       str(e) or 'given up while in flight',
                       0.0 if rejected else getattr(e, 'usd', None))
      if getattr(e, 'overload', False):
        # Not for longer than any of the others would wait.
        wait = e.retry_after_s and min(e.retry_after_s,
                                       self.settings.deadline_s)
        self.limit.overloaded(wait, time.monotonic() - began)
      raise
    else:
      await asyncio.shield(self.ledger.put_soon(
          key, self.core.name, self.stage, request, reply))
      self.limit.succeeded()
      return reply
    finally:
      self._paying.discard(key)

  def stop(self) -> None:
    """No new calls and no more retries from now on."""
    self._closing = True

  async def close(self) -> None:
    """Lets calls at the core finish (they are paid for), then disconnects."""
    self.stop()
    paying = [f.task for k, f in self._flying.items() if k in self._paying]
    if paying:
      await asyncio.wait(paying, timeout=self.settings.timeout_s)
    for flight in list(self._flying.values()):
      flight.task.cancel()
    await self.core.close()


def _pause(error: base.RetryableError, attempt: int) -> float:
  """Seconds until the next try: what the server asked for, or exponential
  backoff with jitter."""
  if error.retry_after_s is not None:
    return error.retry_after_s
  return min(0.25 * 2 ** (attempt - 1) + random.random(), 30.0)


def _token_bound(request: CoreRequest) -> int:
  """At least as many tokens as any byte-level tokenizer can make of it."""
  return sum(len(text.encode(errors='replace')) + 8
             for _, text in request.messages)
