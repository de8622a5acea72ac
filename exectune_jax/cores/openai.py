"""OpenAI, and any server that speaks its chat completions: vLLM, llama.cpp.

  openai:MODEL            chat completions at OpenAI
  openai:MODEL@URL        chat completions at another server
  openai_responses:MODEL  the responses API at OpenAI (or @URL)

A thin aiohttp path: one POST a call. The key comes from OPENAI_API_KEY for
OpenAI itself and from EXECTUNE_CORE_API_KEY for any other server, so that
the first is never sent to a stranger.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import ClassVar

import aiohttp

from exectune_jax.cores import base
from exectune_jax.cores.base import CoreReply, CoreRequest, Price, Usage
from exectune_jax.errors import UserError

OPENAI_URL = 'https://api.openai.com/v1'
EFFORTS = ('none', 'minimal', 'low', 'medium', 'high', 'xhigh')


class OpenAICore:
  """Model `model` at `url` ('' for OpenAI itself), chat completions."""

  provider, path = 'openai', '/chat/completions'
  stream_options: ClassVar = {'stream_options': {'include_usage': True}}

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
    start = time.monotonic()
    async with self._post(self._body(request)) as response:
      body = await response.text(errors='replace')
    with self._unreadable(body):
      text, finish, usage = self._read(json.loads(body))
    return base.make_reply(self, request, text, finish, usage,
                           time.monotonic() - start)

  async def stream(self, request: CoreRequest, on_text) -> CoreReply:
    """`generate` by server-sent events; see cores/base.py."""
    start, events = time.monotonic(), []
    body = {**self._body(request), 'stream': True, **self.stream_options}
    async with self._post(body) as response:
      async for line in response.content:
        data = line.decode(errors='replace').partition('data:')[2].strip()
        if data and data != '[DONE]':
          with self._unreadable(data):
            events.append(json.loads(data))
            on_text(self._piece(events[-1]))
    with self._unreadable(str(events[-1:])):
      text, finish, usage = self._read(self._whole(events))
    return base.make_reply(self, request, text, finish, usage,
                           time.monotonic() - start)

  @contextlib.asynccontextmanager
  async def _post(self, body: dict):
    """A good response, or one of our errors."""
    if self._session is None:
      headers = {'Authorization': f'Bearer {self._key}'} if self._key else {}
      self._session = aiohttp.ClientSession(
          headers=headers, connector=aiohttp.TCPConnector(limit=0),
          timeout=aiohttp.ClientTimeout(total=None))  # the client has one
    try:
      async with self._session.post(self._url + self.path,
                                    json=body) as response:
        if response.status != 200:
          raise base.classify_status(
              response.status, await response.text(errors='replace'),
              self.name, response.headers.get('Retry-After'))
        yield response
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as e:
      raise base.UnreachableError(f'cannot connect to {self._url}') from e
    except (aiohttp.ClientError, aiohttp.http.HttpProcessingError,
            ValueError) as e:  # the last two: a line that never ends
      raise base.RetryableError(
          f'{self.name}: {type(e).__name__}: {str(e)[:200]}') from e

  @contextlib.contextmanager
  def _unreadable(self, body: str):
    try:
      yield
    except (ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as e:
      raise base.RetryableError(
          f'{self.name}: unreadable reply: {body[:100]!r}') from e

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

  def _piece(self, event: dict) -> str:
    """The text that an event of a stream brings."""
    choices = event.get('choices') or [{}]
    piece = (choices[0].get('delta') or {}).get('content') or ''
    if not isinstance(piece, str):
      raise TypeError('content is no text')
    return piece

  def _whole(self, events: list[dict]) -> dict:
    """What `_read` would have got without streaming."""
    whole = {'choices': [{'message': {'content': None, 'refusal': None},
                          'finish_reason': None}], 'usage': None}
    choice = whole['choices'][0]
    for event in events:
      if event.get('error'):
        raise ValueError(str(event['error']))
      whole['usage'] = event.get('usage') or whole['usage']
      for part in event.get('choices') or ():
        for field, value in (part.get('delta') or {}).items():
          if field in ('content', 'refusal') and value:
            choice['message'][field] = (choice['message'][field] or '') + value
        choice['finish_reason'] = (part.get('finish_reason')
                                   or choice['finish_reason'])
    return whole

  async def close(self) -> None:
    if self._session is not None:
      await self._session.close()


class ResponsesCore(OpenAICore):
  """The same through the responses API; it knows no stop strings."""

  provider, path = 'openai_responses', '/responses'
  stream_options: ClassVar = {}

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

  def _piece(self, event: dict) -> str:
    delta = event.get('type') == 'response.output_text.delta'
    return event['delta'] if delta else ''

  def _whole(self, events: list[dict]) -> dict:
    return events[-1]['response']  # completed, incomplete or failed

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
