"""Any OpenAI-compatible server: OpenAI, vLLM, llama.cpp, ...

A thin aiohttp path: one POST to /chat/completions. The key comes from
OPENAI_API_KEY for OpenAI itself and from EXECTUNE_CORE_API_KEY for any other
server, so that the first is never sent to a stranger.
"""

from __future__ import annotations

import json
import os
import time

import aiohttp

from exectune_jax.cores import base
from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.errors import UserError

OPENAI_URL = 'https://api.openai.com/v1'


class OpenAICore:
  """Model `model` at `url` ('' for OpenAI itself)."""

  def __init__(self, model: str, url: str, usd_per_1m: tuple[float, float]):
    self.name = f'openai:{model}' + (f'@{url}' if url else '')
    self.usd_per_1m = usd_per_1m
    self._model, self._url = model, (url or OPENAI_URL).rstrip('/')
    self._official = not url
    variable = 'OPENAI_API_KEY' if self._official else 'EXECTUNE_CORE_API_KEY'
    self._key = os.environ.get(variable, '')
    if self._official and not self._key:
      raise UserError(f"core.name='{self.name}': set {variable} in the "
                      'environment')
    self._session: aiohttp.ClientSession | None = None

  async def generate(self, request: CoreRequest) -> CoreReply:
    if self._session is None:
      headers = {'Authorization': f'Bearer {self._key}'} if self._key else {}
      self._session = aiohttp.ClientSession(
          headers=headers, connector=aiohttp.TCPConnector(limit=0))
    start = time.monotonic()
    try:
      async with self._session.post(f'{self._url}/chat/completions',
                                    json=self._body(request)) as response:
        body = await response.text(errors='replace')
        if response.status != 200:
          raise base.classify_status(response.status, body, self.name,
                                     response.headers.get('Retry-After'))
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as e:
      raise base.UnreachableError(f'cannot connect to {self._url}') from e
    except aiohttp.ClientError as e:
      raise base.RetryableError(
          f'{self.name}: {type(e).__name__}: {e}') from e
    return self._reply(body, request, time.monotonic() - start)

  def _body(self, request: CoreRequest) -> dict:
    limit = 'max_completion_tokens' if self._official else 'max_tokens'
    body = {'model': self._model, limit: request.max_tokens,
            'messages': [{'role': r, 'content': t}
                         for r, t in request.messages]}
    if not (self._official and self._model.startswith('gpt-5')):
      body['temperature'] = request.temperature  # gpt-5 takes no other than 1
    if request.stop:
      body['stop'] = list(request.stop)
    return body

  def _reply(self, body: str, request: CoreRequest,
             latency_s: float) -> CoreReply:
    try:
      data = json.loads(body)
      choice = data['choices'][0]
      message, reason = choice['message'], choice['finish_reason']
      text, usage = message.get('content'), data.get('usage') or {}
      n_in = int(usage['prompt_tokens'])
      n_out = int(usage['completion_tokens'])
    except (ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as e:
      raise base.RetryableError(
          f'{self.name}: unreadable reply: {body[:100]!r}') from e
    if message.get('refusal') or reason == 'content_filter':
      text, finish = message.get('refusal') or text or '', 'refused'
    elif reason == 'length' or (reason == 'stop' and isinstance(text, str)):
      text, finish = text or '', reason  # thinking may leave no text
    else:
      raise base.RetryableError(f'{self.name}: incomplete reply, '
                                f'finish_reason={reason!r}')
    return CoreReply(base.clean(text), finish, n_in, n_out,
                     base.dollars(self.usd_per_1m, n_in, n_out), latency_s)

  async def close(self) -> None:
    if self._session is not None:
      await self._session.close()
