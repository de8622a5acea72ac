"""OpenAI, and any server that speaks its chat completions: vLLM, llama.cpp.

  openai:MODEL            chat completions at OpenAI
  openai:MODEL@URL        chat completions at another server
  openai_responses:MODEL  the responses API at OpenAI (or @URL)

A thin aiohttp path: one POST a call. The key comes from OPENAI_API_KEY for
OpenAI itself and from EXECTUNE_CORE_API_KEY for any other server, so that
the first is never sent to a stranger.
"""

from __future__ import annotations

import json
import os
import time

import aiohttp

from exectune_jax.cores import base
from exectune_jax.cores.base import CoreReply, CoreRequest, Price, Usage
from exectune_jax.errors import UserError

OPENAI_URL = 'https://api.openai.com/v1'
EFFORTS = ('none', 'minimal', 'low', 'medium', 'high', 'xhigh')


class OpenAICore:
  """Model `model` at `url` ('' for OpenAI itself), chat completions."""

  provider, path = 'openai', '/chat/completions'

  def __init__(self, model: str, url: str, price: Price, thinking: str = ''):
    self.name = f'{self.provider}:{model}' + (f'@{url}' if url else '')
    self.price = price
    self._model, self._url = model, (url or OPENAI_URL).rstrip('/')
    self._official = not url
    if thinking and thinking not in EFFORTS:
      raise UserError(f"thinking='{thinking}': for {self.name} it is an "
                      f'effort: {", ".join(EFFORTS)}')
    variable = 'OPENAI_API_KEY' if self._official else 'EXECTUNE_CORE_API_KEY'
    self._key = os.environ.get(variable, '')
    if self._official and not self._key:
      raise UserError(f"name='{self.name}': set {variable} in the "
                      'environment')
    self._session: aiohttp.ClientSession | None = None

  async def generate(self, request: CoreRequest) -> CoreReply:
    if self._session is None:
      headers = {'Authorization': f'Bearer {self._key}'} if self._key else {}
      self._session = aiohttp.ClientSession(
          headers=headers, connector=aiohttp.TCPConnector(limit=0))
    start = time.monotonic()
    try:
      async with self._session.post(self._url + self.path,
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
    try:
      text, finish, usage = self._read(json.loads(body))
    except (ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as e:
      raise base.RetryableError(
          f'{self.name}: unreadable reply: {body[:100]!r}') from e
    return base.make_reply(self, request, text, finish, usage,
                           time.monotonic() - start)

  def _temperature(self, request: CoreRequest) -> dict:
    """OpenAI's thinking models take none but 1."""
    if self._official and (self._model.startswith(('gpt-5', 'o'))
                           or request.thinking):
      base.only_temperature_one(request, self._model)
      return {}
    return {'temperature': request.temperature}

  def _body(self, request: CoreRequest) -> dict:
    limit = 'max_completion_tokens' if self._official else 'max_tokens'
    body = {'model': self._model, limit: request.max_tokens,
            **self._temperature(request),
            'messages': [{'role': r, 'content': t}
                         for r, t in request.messages]}
    if request.thinking:
      body['reasoning_effort'] = request.thinking
    if request.stop:
      body['stop'] = list(request.stop)
    return body

  def _read(self, data: dict) -> tuple[str, str, Usage]:
    """(text, finish, usage); a finish that is none of ours is no answer."""
    choice, usage = data['choices'][0], data.get('usage') or {}
    message, finish = choice['message'], choice.get('finish_reason')
    text = message.get('content')
    if message.get('refusal') or finish == 'content_filter':
      text, finish = message.get('refusal') or text, 'refused'
    elif finish == 'stop' and not isinstance(text, str):
      finish = 'stop without text'
    return text or '', finish, Usage.read(
        usage.get('prompt_tokens'), usage.get('completion_tokens'),
        (usage.get('prompt_tokens_details') or {}).get('cached_tokens'),
        (usage.get('completion_tokens_details') or {}).get('reasoning_tokens'))

  async def close(self) -> None:
    if self._session is not None:
      await self._session.close()


class ResponsesCore(OpenAICore):
  """The same through the responses API; it knows no stop strings."""

  provider, path = 'openai_responses', '/responses'

  def _body(self, request: CoreRequest) -> dict:
    if request.stop:
      raise base.FatalError("the responses API has no stop strings; set the "
                            "core's stop=() or use openai:MODEL")
    body = {'model': self._model, 'max_output_tokens': request.max_tokens,
            'store': False, **self._temperature(request),
            'input': [{'role': 'developer' if r == 'system' else r,
                       'content': t} for r, t in request.messages]}
    if request.thinking:
      body['reasoning'] = {'effort': request.thinking}
    return body

  def _read(self, data: dict) -> tuple[str, str, Usage]:
    usage, finish = data.get('usage') or {}, data.get('status')
    parts = [part for item in data['output'] if item['type'] == 'message'
             for part in item['content']]
    refusals = [p['refusal'] for p in parts if p['type'] == 'refusal']
    text = ''.join(p['text'] for p in parts if p['type'] == 'output_text')
    if finish == 'incomplete':
      finish = {'max_output_tokens': 'length', 'content_filter': 'refused'}.get(
          data['incomplete_details']['reason'], finish)
    elif finish == 'completed':
      finish = 'stop' if parts else 'completed without text'
    if refusals:
      text, finish = ''.join(refusals), 'refused'
    return text, finish, Usage.read(
        usage.get('input_tokens'), usage.get('output_tokens'),
        (usage.get('input_tokens_details') or {}).get('cached_tokens'),
        (usage.get('output_tokens_details') or {}).get('reasoning_tokens'))
