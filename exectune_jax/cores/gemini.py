"""Gemini through google-genai, with the SDK's own retries off.

The key comes from GEMINI_API_KEY (or GOOGLE_API_KEY).
"""

from __future__ import annotations

import contextlib
import os
import time

import aiohttp

from exectune_jax.cores import base
from exectune_jax.cores.base import CoreReply, CoreRequest, Price, Usage
from exectune_jax.errors import UserError

_REFUSALS = {'SAFETY', 'RECITATION', 'BLOCKLIST', 'PROHIBITED_CONTENT', 'SPII'}


class GeminiCore:
  """Model `model`; `url` replaces Google's address (a proxy, a test)."""

  def __init__(self, model: str, url: str, price: Price, thinking: str = ''):
    self.name = f'gemini:{model}' + (f'@{url}' if url else '')
    self.price = price
    self._model, self._url = model, url
    self._key = (os.environ.get('GEMINI_API_KEY')
                 or os.environ.get('GOOGLE_API_KEY'))
    if not self._key:
      raise UserError(f"name='{self.name}': set GEMINI_API_KEY in the "
                      'environment')
    if thinking and not thinking.isdecimal():
      raise UserError(f"thinking='{thinking}': for Gemini it is a number of "
                      'tokens, 0 for none')
    import google.genai  # noqa: F401 a second, which no call should pay
    self._client = None

  async def generate(self, request: CoreRequest) -> CoreReply:
    start = time.monotonic()
    with self._errors():
      response = await self._models().generate_content(**self._body(request))
    return base.make_reply(self, request, *_read(response),
                           time.monotonic() - start)

  async def stream(self, request: CoreRequest, on_text) -> CoreReply:
    """`generate` by server-sent events; see cores/base.py."""
    start, text, finish, usage = time.monotonic(), '', None, Usage(None, None)
    with self._errors():
      async for part in await self._models().generate_content_stream(
          **self._body(request)):
        piece, ended, used = _read(part)
        text, finish = text + piece, ended or finish
        usage = used if used.known else usage
        on_text(piece)
    return base.make_reply(self, request, text, finish, usage,
                           time.monotonic() - start)

  def _models(self):
    from google import genai
    from google.genai import types
    if self._client is None:  # 0.1 s to build: one per process
      # attempts=1 also turns off a hidden retry after up to nine seconds.
      options = types.HttpOptions(
          base_url=self._url or None,
          retry_options=types.HttpRetryOptions(attempts=1))
      self._client = genai.Client(api_key=self._key, http_options=options)
    return self._client.aio.models

  def _body(self, request: CoreRequest) -> dict:
    from google.genai import types
    system = '\n'.join(t for r, t in request.messages if r == 'system')
    contents = [types.Content(role='model' if r == 'assistant' else 'user',
                              parts=[types.Part(text=t)])
                for r, t in request.messages if r != 'system']
    return {'model': self._model, 'contents': contents,
            'config': types.GenerateContentConfig(
                system_instruction=system or None,
                temperature=request.temperature,
                max_output_tokens=request.max_tokens,
                stop_sequences=list(request.stop) or None,
                thinking_config=types.ThinkingConfig(
                    thinking_budget=int(request.thinking))
                if request.thinking else None)}

  @contextlib.contextmanager
  def _errors(self):
    """Turns the SDK's errors into ours."""
    from google.genai import errors
    try:
      yield
    except errors.APIError as e:
      if e.code == 400 and 'api key' in (e.message or '').lower():
        raise base.FatalError(f'{self.name}: {e.message}') from e
      raise base.classify_status(e.code or 500, e.message or '', self.name,
                                 _retry_after(e)) from e
    except aiohttp.ClientConnectorError as e:
      raise base.UnreachableError(f'cannot connect: {e.host}') from e
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, TypeError,
            LookupError, AttributeError) as e:
      # the last four: not JSON, not text, or not Gemini's schema
      raise base.RetryableError(f'{self.name}: {type(e).__name__}') from e

  async def close(self) -> None:
    if self._client is not None:
      await self._client.aio.aclose()


def _read(response) -> tuple[str, str | None, Usage]:
  """(text, finish, usage); a finish that is none of ours is no answer."""
  used = response.usage_metadata
  thought = (used.thoughts_token_count or 0) if used else 0
  written = used.candidates_token_count if used else None
  if used and written is None and used.prompt_token_count is not None:
    written = 0  # blocked, or all of it thoughts
  usage = Usage.read(
      used.prompt_token_count if used else None,
      None if written is None else written + thought,  # both are billed
      used.cached_content_token_count if used else 0, thought)
  finish, text = None, ''
  if response.candidates:
    candidate = response.candidates[0]
    reason = getattr(candidate.finish_reason, 'value',
                     candidate.finish_reason)
    finish = {'STOP': 'stop', 'MAX_TOKENS': 'length'}.get(reason, reason)
    parts = (candidate.content.parts or []) if candidate.content else []
    text = ''.join(p.text or '' for p in parts if not p.thought)
  blocked = response.prompt_feedback and response.prompt_feedback.block_reason
  return text, 'refused' if blocked or finish in _REFUSALS else finish, usage


def _retry_after(error) -> str | None:
  """The delay that Google puts into the body, as '34s', or the header."""
  try:
    for detail in error.details['error']['details']:
      if detail.get('@type', '').endswith('RetryInfo'):
        return detail['retryDelay']
    return error.response.headers.get('Retry-After')
  except (AttributeError, LookupError, TypeError):
    return None
