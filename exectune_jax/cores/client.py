"""What stands between a request and an adapter.

Ledger first, then one flight per request, budget, rate and concurrency
limits, retries with jitter under a deadline. A call returns a reply that is
already in the ledger, or raises Lost.
"""

from __future__ import annotations

import asyncio

import aiolimiter
import tenacity

from exectune_jax.cores import base
from exectune_jax.cores.base import Core, CoreReply, CoreRequest
from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import Lost, UserError


class CoreClient:
  """One core as everybody uses it. Lives on one event loop.

  Args:
    core: the adapter.
    ledger: where replies are kept.
    settings: a core section of the config (concurrency, attempts,
      timeout_s for one try, deadline_s for all, requests_per_minute).
    stage: written beside each reply, for the bill.
    field: the config section's name, for error messages.
  """

  def __init__(self, core: Core, ledger: Ledger, settings, stage: str,
               field: str = 'core'):
    self.core, self.ledger, self.settings = core, ledger, settings
    self.stage, self.field = stage, field
    self._flying: dict[str, asyncio.Task] = {}
    self._paying: set[str] = set()  # past the queue: at the core now
    self._slots = asyncio.Semaphore(settings.concurrency)
    self._rate = (aiolimiter.AsyncLimiter(settings.requests_per_minute, 60)
                  if settings.requests_per_minute else None)
    self._answered = False
    self._closing = False

  async def call(self, request: CoreRequest) -> CoreReply:
    """The reply to `request`, from the ledger or the core.

    Raises:
      Lost: no answer after all retries, or the deadline passed.
      UserError: no request can succeed (key, model, address, budget).
    """
    key = request.key(self.core.name)
    reply = self.ledger.get(key)
    if reply is not None:
      return reply
    task = self._flying.get(key)
    if task is None:
      task = asyncio.create_task(self._fly(key, request))
      self._flying[key] = task
      task.add_done_callback(lambda t: self._land(key, t))
    # Shielded: a waiter that gives up must not lose a reply we pay for.
    return await asyncio.shield(task)

  def _land(self, key: str, task: asyncio.Task) -> None:
    self._flying.pop(key, None)
    if not task.cancelled():
      task.exception()  # seen, even if every waiter has given up

  async def _fly(self, key: str, request: CoreRequest) -> CoreReply:
    worst = base.dollars(self.core.usd_per_1m, _token_bound(request),
                         request.max_tokens)
    async with self._slots:
      if self._closing:  # queued behind a stop: buy nothing more
        raise Lost('stopped')
      self.ledger.reserve(worst)
      self._paying.add(key)
      try:
        reply = await self._with_retries(request)
        self.ledger.put(key, self.core.name, self.stage, request, reply)
        return reply
      finally:
        self._paying.discard(key)
        self.ledger.release(worst)

  async def _with_retries(self, request: CoreRequest) -> CoreReply:
    s = self.settings
    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(s.attempts),
        wait=_wait, reraise=True,
        retry=tenacity.retry_if_exception_type(base.RetryableError))
    try:
      async with asyncio.timeout(s.deadline_s):
        reply = await retrying(self._once, request)
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
      raise Lost(f'{self.core.name}: deadline_s={s.deadline_s:g} passed') from e
    self._answered = True
    return reply

  async def _once(self, request: CoreRequest) -> CoreReply:
    if self._closing:
      raise base.RequestError('stopped')
    if self._rate:
      await self._rate.acquire()
    try:
      async with asyncio.timeout(self.settings.timeout_s):
        return await self.core.generate(request)
    except TimeoutError as e:
      raise base.RetryableError(
          f'{self.core.name}: no reply in {self.settings.timeout_s:g} s') from e

  def stop(self) -> None:
    """No new calls and no more retries from now on."""
    self._closing = True

  async def close(self) -> None:
    """Lets calls at the core finish (they are paid for), then disconnects."""
    self.stop()
    paying = [t for k, t in self._flying.items() if k in self._paying]
    if paying:
      await asyncio.wait(paying, timeout=self.settings.timeout_s)
    for task in list(self._flying.values()):
      task.cancel()
    await self.core.close()


_backoff = tenacity.wait_exponential_jitter(initial=0.25, max=30)


def _wait(state: tenacity.RetryCallState) -> float:
  """What the server asked for, else exponential backoff with jitter."""
  asked = getattr(state.outcome.exception(), 'retry_after_s', None)
  return _backoff(state) if asked is None else asked


def _token_bound(request: CoreRequest) -> int:
  """At least as many tokens as any byte-level tokenizer can make of it."""
  return sum(len(text.encode(errors='replace')) + 8
             for _, text in request.messages)
