"""Gemini through google-genai, with the SDK's own retries off.

The key comes from GEMINI_API_KEY (or GOOGLE_API_KEY).
"""

from __future__ import annotations

import os
import time

import aiohttp

from exectune_jax.cores import base
from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.errors import UserError

_REFUSALS = {'SAFETY', 'RECITATION', 'BLOCKLIST', 'PROHIBITED_CONTENT', 'SPII'}


class GeminiCore:
  """Model `model`; `url` replaces Google's address (a proxy, a test)."""

  def __init__(self, model: str, url: str, usd_per_1m: tuple[float, float]):
    self.name = f'gemini:{model}' + (f'@{url}' if url else '')
    self.usd_per_1m = usd_per_1m
    self._model, self._url = model, url
    self._key = (os.environ.get('GEMINI_API_KEY')
                 or os.environ.get('GOOGLE_API_KEY'))
    if not self._key:
      raise UserError(f"core.name='{self.name}': set GEMINI_API_KEY in the "
                      'environment')
    self._client = None

  async def generate(self, request: CoreRequest) -> CoreReply:
    from google import genai
    from google.genai import errors, types
    if self._client is None:  # 0.1 s to build: one per process
      # attempts=1 also turns off a hidden retry after up to nine seconds.
      options = types.HttpOptions(
          base_url=self._url or None,
          retry_options=types.HttpRetryOptions(attempts=1))
      self._client = genai.Client(api_key=self._key, http_options=options)
    start = time.monotonic()
    system = '\n'.join(t for r, t in request.messages if r == 'system')
    contents = [types.Content(role='model' if r == 'assistant' else 'user',
                              parts=[types.Part(text=t)])
                for r, t in request.messages if r != 'system']
    try:
      response = await self._client.aio.models.generate_content(
          model=self._model, contents=contents,
          config=types.GenerateContentConfig(
              system_instruction=system or None,
              temperature=request.temperature,
              max_output_tokens=request.max_tokens,
              stop_sequences=list(request.stop) or None))
    except errors.APIError as e:
      if e.code == 400 and 'api key' in (e.message or '').lower():
        raise base.FatalError(f'{self.name}: {e.message}') from e
      raise base.classify_status(e.code or 500, e.message or '',
                                 self.name) from e
    except aiohttp.ClientConnectorError as e:
      raise base.UnreachableError(f'cannot connect: {e.host}') from e
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, TypeError,
            LookupError, AttributeError) as e:
      # the last four: not JSON, not text, or not Gemini's schema
      raise base.RetryableError(f'{self.name}: {type(e).__name__}') from e
    return self._reply(response, time.monotonic() - start)

  def _reply(self, response, latency_s: float) -> CoreReply:
    usage = response.usage_metadata
    n_in = (usage.prompt_token_count or 0) if usage else 0
    # Thinking is billed as output.
    n_out = ((usage.candidates_token_count or 0)
             + (usage.thoughts_token_count or 0)) if usage else 0
    feedback = response.prompt_feedback
    reason, text = None, ''
    if response.candidates:
      candidate = response.candidates[0]
      reason = getattr(candidate.finish_reason, 'value',
                       candidate.finish_reason)
      parts = (candidate.content.parts or []) if candidate.content else []
      text = ''.join(p.text or '' for p in parts if not p.thought)
    if (feedback and feedback.block_reason) or reason in _REFUSALS:
      finish = 'refused'
    elif reason in ('STOP', 'MAX_TOKENS'):
      finish = 'stop' if reason == 'STOP' else 'length'
    else:
      raise base.RetryableError(f'{self.name}: empty reply, '
                                f'finish_reason={reason}')
    return CoreReply(base.clean(text), finish, n_in, n_out,
                     base.dollars(self.usd_per_1m, n_in, n_out), latency_s)

  async def close(self) -> None:
    if self._client is not None:
      await self._client.aio.aclose()
