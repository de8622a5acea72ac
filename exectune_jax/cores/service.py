"""The event loop thread on which all core calls of a stage run.

The main thread drives the accelerator; this thread waits for networks. A
stage opens one service, hands coroutines over with `submit` or `run`, and
closes it, which lets paid calls finish and closes connections.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import json
import pathlib
import threading

from exectune_jax import interrupt
from exectune_jax.cores import ledger as ledger_lib
from exectune_jax.cores import prices
from exectune_jax.cores.base import Core, Price
from exectune_jax.cores.client import CoreClient
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores.limits import Concurrency
from exectune_jax.errors import UserError
from exectune_jax.rewards.graders import Graders


ADAPTERS = {
    'gemini': 'gemini:GeminiCore',
    'anthropic': 'anthropic:AnthropicCore',
    'openai': 'openai:OpenAICore',
    'openai_responses': 'openai:ResponsesCore',
}


def make_core(name: str, price: Price, field: str = 'core',
              thinking: str = '') -> Core:
  """The adapter for 'provider:model' or 'provider:model@base_url'."""
  provider, _, model = name.partition(':')
  if provider == 'toy':
    from exectune_jax.cores.toy import ToyCore
    return ToyCore(model)
  model, _, url = model.partition('@')
  if not model or provider not in ADAPTERS:
    raise UserError(f"{field}.name='{name}': write provider:model with "
                    f"provider toy, {', '.join(ADAPTERS)}, such as "
                    "'gemini:gemini-2.5-flash' or "
                    "'openai:qwen@http://127.0.0.1:8000/v1'")
  module, _, adapter = ADAPTERS[provider].partition(':')
  try:
    make = getattr(importlib.import_module(f'exectune_jax.cores.{module}'),
                   adapter)
    return make(model, url, price, thinking)
  except UserError as e:  # the adapter knows the leaf, we know the section
    raise UserError(f'{field}.{e}') from e


class CoreService:
  """Owns the loop thread, the ledger and one client per core.

  Args:
    config: the whole config.
    workdir: holds ledger.sqlite, unless config.ledger says otherwise.
    stage: name for the bill.
    host: each of several processes has a ledger of its own.
    budget_usd: limit of that ledger; None: config.budget_usd, all of it.
  """

  def __init__(self, config, workdir: pathlib.Path, stage: str,
               host: int = 0, budget_usd: float | None = None):
    self.config = config
    self.stage = ledger_lib.stage_of(config, stage)
    self.ledger = Ledger(ledger_lib.path_of(config, workdir, host),
                         config.budget_usd)
    if budget_usd is not None and budget_usd != config.budget_usd:
      self.ledger.budget_usd = budget_usd
      self.ledger.budget_name += f', {budget_usd:g} of it for this process'
    self._clients: dict[str, CoreClient] = {}
    self._graders: dict[str, Graders] = {}
    self._limits: dict[str, Concurrency] = {}  # one for each provider
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
      for graders in self._graders.values():
        await graders.close()
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
      core = make_core(settings.name, price, field, settings.thinking)
      async def build():  # futures and locks belong to the loop
        return CoreClient(core, self.ledger, settings, self.stage, field,
                          self._limit(settings), self.config.run)
      self._clients[field] = self.submit(build()).result()
    return self._clients[field]

  def graders(self, options, shots: int) -> Graders:
    """The grader processes of a task, shared by all who ask for it."""
    key = json.dumps([options.to_dict(), shots])
    if key not in self._graders:
      async def build():
        return Graders(options, shots, self.config.grader_processes)
      self._graders[key] = self.submit(build()).result()
    return self._graders[key]

  def _limit(self, settings) -> Concurrency:
    """Teacher, core and judge of one provider share what it can bear."""
    provider, _, model = settings.name.partition(':')
    where = f'{provider}@{model.partition("@")[2]}'
    bounds = settings.min_concurrency, settings.concurrency
    if where in self._limits:
      self._limits[where].widen(*bounds)
    return self._limits.setdefault(where, Concurrency(*bounds))

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
          interrupt.check(agreed=True)  # of several, only one asks cores here
