"""The event loop thread on which all core calls of a stage run.

The main thread drives the accelerator; this thread waits for networks. A
stage opens one service, hands coroutines over with `submit` or `run`, and
closes it, which lets paid calls finish and closes connections.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import pathlib
import threading

from exectune_jax import interrupt
from exectune_jax.cores import prices
from exectune_jax.cores.base import Core
from exectune_jax.cores.client import CoreClient
from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import UserError


def make_core(name: str, usd_per_1m: tuple[float, float],
              field: str = 'core') -> Core:
  """The adapter for 'provider:model' or 'provider:model@base_url'."""
  provider, _, model = name.partition(':')
  if provider == 'toy':
    from exectune_jax.cores.toy import ToyCore
    return ToyCore(model)
  model, _, url = model.partition('@')
  if model and provider == 'openai':
    from exectune_jax.cores.openai import OpenAICore
    return OpenAICore(model, url, usd_per_1m)
  if model and provider == 'gemini':
    from exectune_jax.cores.gemini import GeminiCore
    return GeminiCore(model, url, usd_per_1m)
  raise UserError(f"{field}.name='{name}': write provider:model with provider "
                  "toy, openai or gemini, such as 'gemini:gemini-2.5-flash' "
                  "or 'openai:qwen@http://127.0.0.1:8000/v1'")


class CoreService:
  """Owns the loop thread, the ledger and one client per core.

  Args:
    config: the whole config.
    workdir: holds ledger.sqlite.
    stage: name for the bill.
    host, hosts: each of several processes has a ledger of its own, and its
      share of the budget.
  """

  def __init__(self, config, workdir: pathlib.Path, stage: str,
               host: int = 0, hosts: int = 1):
    self.config, self.stage = config, stage
    name = f'ledger.{host}.sqlite' if host else 'ledger.sqlite'
    self.ledger = Ledger(workdir / name, config.budget_usd / hosts)
    self._clients: dict[str, CoreClient] = {}
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever,
                                    name='cores', daemon=True)

  def __enter__(self) -> CoreService:
    self._thread.start()
    return self

  def __exit__(self, *_):
    async def close():
      for client in self._clients.values():
        client.stop()
      for client in self._clients.values():
        await client.close()
      rest = asyncio.all_tasks() - {asyncio.current_task()}
      for task in rest:
        task.cancel()
      await asyncio.gather(*rest, return_exceptions=True)
    asyncio.run_coroutine_threadsafe(close(), self._loop).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()
    self.ledger.close()

  def client(self, field: str) -> CoreClient:
    """The client of config section `field` ('core', 'teacher', ...)."""
    if field not in self._clients:
      settings = self.config[field]
      price = prices.lookup(settings, field)
      core = make_core(settings.name, price, field)
      async def build():  # semaphores belong to the loop
        return CoreClient(core, self.ledger, settings, self.stage, field)
      self._clients[field] = self.submit(build()).result()
    return self._clients[field]

  def submit(self, coroutine) -> concurrent.futures.Future:
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

  def run(self, coroutine):
    """Result of a coroutine; returns early with Stopped on Ctrl-C."""
    return self.wait(self.submit(coroutine))

  def wait(self, future: concurrent.futures.Future):
    """Result of a future, watching for a request to stop."""
    while True:
      try:
        return future.result(timeout=0.1)
      except concurrent.futures.TimeoutError:
        if future.done():  # the coroutine itself raised TimeoutError
          return future.result()
        if interrupt.requested():
          future.cancel()
        interrupt.check()
