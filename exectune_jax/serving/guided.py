"""From a chat to a guided answer: the guide plans, the core carries it out."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
import traceback
from collections.abc import Callable

from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.episode import Problem
from exectune_jax.serving.engine import Engine, GuideError
from exectune_jax.serving.wire import Ask


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the guide contributed.

  strategy: None if the core answers alone.
  alone: why it does: 'asked for', 'too long', 'late', 'malformed',
    'guide failed'; '' if it does not.
  tokens: prompt and strategy, in the guide's tokens.
  """
  strategy: str | None = None
  alone: str = ''
  tokens: int = 0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Answer:
  """A core's reply, and how it came about.

  cached: it was in the ledger, or somebody else's request paid for it.
  """
  reply: CoreReply
  plan: Plan
  cached: bool
  seconds: float
  usd: float

  def extension(self, core: str) -> dict:
    """What the response says beside OpenAI's fields."""
    return {'guided': self.plan.strategy is not None,
            'strategy': self.plan.strategy, 'alone': self.plan.alone or None,
            'core': core, 'cached': self.cached, 'usd': self.usd,
            'guide_tokens': self.plan.tokens,
            'guide_seconds': round(self.plan.seconds, 4),
            'seconds': round(self.seconds, 4)}


class GuidedCore:
  """Answers chats through an engine and a core client, on its event loop.

  Args:
    engine: the guide at work.
    client: of the section `core`.
    task: says how a core is asked, as it was in training.
    config: the whole config.
  """

  def __init__(self, engine: Engine, client, task, config):
    self.engine, self.client, self.task = engine, client, task
    self.settings, self.deadline_s = config.core, config.serve.deadline_s
    self.guide_price = config.guide.usd_per_1m_tokens / 1e6

  async def answer(self, ask: Ask,
                   on_text: Callable[[str], None] | None = None) -> Answer:
    """The core's answer to a chat.

    Args:
      on_text: is called with pieces of it as they come.

    Raises:
      Lost, UserError: the core does not answer.
    """
    began = time.monotonic()
    problem = Problem('served', ask.messages[-1][1], '')
    plan = await self._plan(problem, ask.guided)
    request = self._request(ask, problem, plan.strategy)
    reply, paid = await self.client.ask(request, on_text)
    usd = reply.usd * paid + plan.tokens * self.guide_price
    return Answer(reply, plan, not paid, time.monotonic() - began, usd)

  async def _plan(self, problem: Problem, wanted: bool) -> Plan:
    if not wanted:
      return Plan(alone='asked for')
    began = time.monotonic()
    try:
      async with asyncio.timeout(self.deadline_s):
        strategy, tokens = await self.engine.write(problem)
    except TimeoutError:
      return Plan(alone='late', seconds=time.monotonic() - began)
    except GuideError as e:
      return Plan(alone=str(e), seconds=time.monotonic() - began)
    except Exception:  # noqa: BLE001 a guide that fails is done without
      traceback.print_exc()
      return Plan(alone='guide failed', seconds=time.monotonic() - began)
    return Plan(strategy.body, '' if strategy.body else 'malformed', tokens,
                time.monotonic() - began)

  def _request(self, ask: Ask, problem: Problem,
               strategy: str | None) -> CoreRequest:
    """As in training, with the chat around it: what the client said before
    stays, and its system message takes the place of the task's."""
    messages = tuple(self.task.core_messages(problem, strategy))
    if len(ask.messages) > 1:
      ours = messages if ask.messages[0][0] != 'system' else [
          m for m in messages if m[0] != 'system']
      system = [m for m in ours if m[0] == 'system']
      messages = (*system, *ask.messages[:-1],
                  *(m for m in ours[:-1] if m[0] != 'system'), ours[-1])
    request = CoreRequest.build(self.settings, messages)
    if ask.temperature is not None:
      request = dataclasses.replace(request, temperature=float(ask.temperature))
    if request.temperature > 0:  # every answer is a draw of its own
      request = dataclasses.replace(request, sample=secrets.randbits(53))
    limit = min(ask.max_tokens or request.max_tokens, request.max_tokens)
    return dataclasses.replace(request, max_tokens=limit,
                               stop=request.stop if ask.stop is None
                               else ask.stop)
