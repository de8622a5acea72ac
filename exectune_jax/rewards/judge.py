"""An LLM judge of strategies, with a strict schema and one repair try."""

from __future__ import annotations

import json

from exectune_jax import prompts
from exectune_jax.cores.base import CoreRequest
from exectune_jax.errors import Lost


async def judge(client, settings, question: str,
                strategy: str) -> tuple[float, bool]:
  """(quality in [0, 1], whether it leaks the answer).

  Raises:
    Lost: the judge cannot be reached, or twice gave something else than the
      schema. Never a score of 0 for the strategy.
  """
  messages = prompts.judge_messages(question, strategy)
  for _ in range(2):
    reply = await client.call(CoreRequest.build(settings, messages))
    if reply.finish == 'refused':
      raise Lost(f'judge: refused to answer: {reply.text[:80]!r}')
    parsed = parse(reply.text)
    if parsed is not None:
      return parsed
    messages = (*messages, ('assistant', reply.text),
                ('user', prompts.JUDGE_REPAIR))
  raise Lost(f'judge: not the JSON asked for: {reply.text[:80]!r}')


def _once(pairs):
  if len({name for name, _ in pairs}) < len(pairs):
    raise ValueError('a field twice')
  return dict(pairs)


def parse(text: str) -> tuple[float, bool] | None:
  """Reads exactly {"quality": number in [0, 1], "leaks_answer": bool}."""
  text = text.strip().removeprefix('```json').removesuffix('```')
  try:
    data = json.loads(text, object_pairs_hook=_once)
  except (ValueError, RecursionError):
    return None
  if not isinstance(data, dict) or set(data) != {'quality', 'leaks_answer'}:
    return None
  quality, leaks = data['quality'], data['leaks_answer']
  if isinstance(quality, bool) or not isinstance(quality, int | float):
    return None
  if not isinstance(leaks, bool) or not 0 <= quality <= 1:
    return None
  return float(quality), leaks
