"""Claude through Anthropic's SDK, with the SDK's own retries off.

The key comes from ANTHROPIC_API_KEY. Needs the extra `anthropic`.
"""

from __future__ import annotations

import contextlib
import os
import time

from exectune_jax.cores import base
from exectune_jax.cores.base import CoreReply, CoreRequest, Price, Usage
from exectune_jax.errors import UserError

_FINISH = {'end_turn': 'stop', 'stop_sequence': 'stop', 'max_tokens': 'length',
           'refusal': 'refused'}


class AnthropicCore:
  """Model `model`; `url` replaces Anthropic's address (a proxy, a test)."""

  def __init__(self, model: str, url: str, price: Price, thinking: str = ''):
    self.name = f'anthropic:{model}' + (f'@{url}' if url else '')
    self.price = price
    self._model = model
    try:
      import anthropic
    except ImportError as e:
      raise UserError(f"name='{self.name}': needs the package anthropic: pip "
                      "install -e '.[anthropic]'") from e
    key = os.environ.get('ANTHROPIC_API_KEY')
    if not key:
      raise UserError(f"name='{self.name}': set ANTHROPIC_API_KEY in the "
                      'environment')
    if thinking and not (thinking.isdecimal() and int(thinking) >= 1024):
      raise UserError(f"thinking='{thinking}': for Claude it is a number of "
                      "tokens, at least 1024, or '' for none")
    # Our own timeout, retries and concurrency stand around every call.
    self._client = anthropic.AsyncAnthropic(
        api_key=key, base_url=url or None, max_retries=0, timeout=None)

  async def generate(self, request: CoreRequest) -> CoreReply:
    start = time.monotonic()
    with self._errors():
      message = await self._client.messages.create(**self._body(request))
      text, finish, usage = _read(message)
    return base.make_reply(self, request, text, finish, usage,
                           time.monotonic() - start)

  async def stream(self, request: CoreRequest, on_text) -> CoreReply:
    """`generate` by server-sent events; see cores/base.py."""
    start = time.monotonic()
    with self._errors():
      async with self._client.messages.stream(**self._body(request)) as stream:
        async for piece in stream.text_stream:
          on_text(piece)
        text, finish, usage = _read(await stream.get_final_message())
    return base.make_reply(self, request, text, finish, usage,
                           time.monotonic() - start)

  @contextlib.contextmanager
  def _errors(self):
    """Turns the SDK's errors into ours."""
    import anthropic
    try:
      yield
    except anthropic.APIStatusError as e:
      raise base.classify_status(
          e.status_code, e.message, self.name,
          e.response.headers.get('retry-after')) from e
    except anthropic.APIConnectionError as e:
      if 'ConnectError' in type(e.__cause__).__name__:
        raise base.UnreachableError(f'{self.name}: cannot connect') from e
      raise base.RetryableError(
          f'{self.name}: {type(e.__cause__ or e).__name__}') from e
    except (anthropic.AnthropicError, ValueError, TypeError, LookupError,
            AttributeError, AssertionError) as e:
      # not JSON; a web page, which the SDK hands over as str; no message
      raise base.RetryableError(
          f'{self.name}: unreadable reply: {type(e).__name__}') from e
    except Exception as e:
      # A stream that breaks shows the HTTP library below, which has changed.
      if not type(e).__module__.startswith('httpx'):
        raise
      raise base.RetryableError(f'{self.name}: {type(e).__name__}') from e

  def _body(self, request: CoreRequest) -> dict:
    system = '\n'.join(t for r, t in request.messages if r == 'system')
    body = {'model': self._model, 'max_tokens': request.max_tokens,
            'messages': [{'role': r, 'content': t}
                         for r, t in request.messages if r != 'system']}
    if system:
      body['system'] = system
    if request.stop:
      body['stop_sequences'] = list(request.stop)
    if request.thinking:
      body['thinking'] = {'type': 'enabled',
                          'budget_tokens': int(request.thinking)}
    base.only_temperature_one(request, 'Claude')  # SDK 2 has no such field
    return body

  async def close(self) -> None:
    await self._client.close()


def _read(message) -> tuple[str, str | None, Usage]:
  """(text, finish, usage); a finish that is none of ours is no answer."""
  text = ''.join(b.text for b in message.content or () if b.type == 'text')
  used = message.usage
  cached = (used.cache_read_input_tokens or 0) if used else 0
  # Unlike the others, Anthropic counts cached input beside the rest.
  n_in = used.input_tokens if used else None
  if isinstance(n_in, int):
    n_in += cached + (used.cache_creation_input_tokens or 0)
  details = getattr(used, 'output_tokens_details', None)
  finish = _FINISH.get(message.stop_reason, message.stop_reason)
  return text, finish, Usage.read(
      n_in, used.output_tokens if used else None, cached,
      getattr(details, 'thinking_tokens', 0))
