"""OpenAI's chat completions, as far as a guided core can honour them."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid

from exectune_jax.cores.base import CoreReply

ROLES = {'system': 'system', 'developer': 'system', 'user': 'user',
         'assistant': 'assistant'}
# What would change the answer and cannot be passed on is refused, not ignored.
UNSUPPORTED = ('tools', 'tool_choice', 'functions', 'function_call',
               'logprobs', 'top_logprobs', 'logit_bias', 'audio', 'modalities',
               'presence_penalty', 'frequency_penalty', 'prediction')
FINISH = {'stop': 'stop', 'length': 'length', 'refused': 'content_filter'}


class ApiError(Exception):
  """An answer with an error status.

  status: HTTP. kind, code, param: as in OpenAI's error object.
  """

  def __init__(self, status: int, message: str, code: str | None = None,
               param: str | None = None, kind: str = 'invalid_request_error',
               headers: dict | None = None):
    super().__init__(message)
    self.status, self.headers = status, headers or {}
    self.body = {'error': {'message': message, 'type': kind, 'param': param,
                           'code': code}}


@dataclasses.dataclass(frozen=True)
class Ask:
  """A request that can be answered.

  messages: ((role, text), ...); the last one is the user's problem.
  guided: False if the client wants the core alone.
  temperature, max_tokens, stop: None for those of the config.
  """
  model: str
  messages: tuple[tuple[str, str], ...]
  stream: bool
  include_usage: bool
  guided: bool
  temperature: float | None
  max_tokens: int | None
  stop: tuple[str, ...] | None


def read(body: bytes, guided_model: str, core_model: str) -> Ask:
  """The request in a body.

  Args:
    guided_model, core_model: names for the core with the guide, and alone.

  Raises:
    ApiError: 400 or 404, with the field.
  """
  try:
    data = json.loads(body)
  except (ValueError, RecursionError) as e:
    raise ApiError(400, f'the body is not JSON: {str(e)[:100]}') from e
  if not isinstance(data, dict):
    raise ApiError(400, 'the body must be a JSON object')
  model = data.get('model')
  if model not in (guided_model, core_model):
    raise ApiError(404, f'model={model!r}: choose {guided_model!r}, or '
                   f'{core_model!r} for the core alone', 'model_not_found',
                   'model')
  for field in UNSUPPORTED:
    if data.get(field):
      raise ApiError(400, f'{field}: not supported here', param=field)
  for field, only in (('n', 1), ('top_p', 1)):
    if data.get(field) not in (None, only):
      raise ApiError(400, f'{field}={data[field]!r}: only {only} is supported',
                     param=field)
  form = data.get('response_format')
  if form and form != {'type': 'text'}:
    raise ApiError(400, 'response_format: only text is supported',
                   param='response_format')
  ours = _typed(data, 'exectune', dict, {})
  wanted = _typed(ours, 'guide', bool, True)
  options = _typed(data, 'stream_options', dict, {})
  return Ask(model, _messages(data), _typed(data, 'stream', bool, False),
             _typed(options, 'include_usage', bool, False),
             wanted and model == guided_model,
             _number(data, 'temperature', 0.0, 2.0),
             _limit(data), _stop(data))


def _typed(data: dict, field: str, kind: type, default):
  value = data.get(field)
  if value is None:
    return default
  if not isinstance(value, kind):
    raise ApiError(400, f'{field}={str(value)[:50]!r}: must be '
                   f'{"true or false" if kind is bool else "an object"}',
                   param=field)
  return value


def _messages(data: dict) -> tuple[tuple[str, str], ...]:
  given = data.get('messages')
  if not isinstance(given, list) or not given:
    raise ApiError(400, 'messages: a list with at least one message',
                   param='messages')
  found = []
  for i, message in enumerate(given):
    where = f'messages[{i}]'
    role = message.get('role') if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
      raise ApiError(400, f'{where}.role: choose from {", ".join(ROLES)}',
                     param=where)
    text = _text(message.get('content'), where)
    _check_unicode(text, where)
    found.append((ROLES[role], text))
  if found[-1][0] != 'user' or not found[-1][1].strip():
    raise ApiError(400, 'messages: the last one must be a text of the user',
                   param='messages')
  return tuple(found)


def _text(content, where: str) -> str:
  if isinstance(content, str):
    return content
  parts = content if isinstance(content, list) else [None]
  if not all(isinstance(p, dict) and p.get('type') == 'text'
             and isinstance(p.get('text'), str) for p in parts):
    raise ApiError(400, f'{where}.content: only text is supported',
                   param=where)
  return '\n'.join(p['text'] for p in parts)


def _check_unicode(text: str, where: str) -> None:
  """JSON can hold halves of characters, which nothing else can."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise ApiError(400, f'{where}: not valid Unicode', param=where) from e


def _number(data: dict, field: str, low: float, high: float):
  value = data.get(field)
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, int | float) or (
      not low <= value <= high):
    raise ApiError(400, f'{field}={str(value)[:50]}: must be {low:g} to '
                   f'{high:g}', param=field)
  return value


def _limit(data: dict) -> int | None:
  for field in ('max_completion_tokens', 'max_tokens'):
    value = _number(data, field, 1, 1 << 31)
    if value is not None:
      return int(value)
  return None


def _stop(data: dict) -> tuple[str, ...] | None:
  value = data.get('stop')
  if value is None:
    return None
  found = (value,) if isinstance(value, str) else value
  if not isinstance(found, list | tuple) or len(found) > 4 or not all(
      isinstance(s, str) and s for s in found):
    raise ApiError(400, 'stop: one to four texts', param='stop')
  _check_unicode(''.join(found), 'stop')
  return tuple(found)


class Reply:
  """The objects of one answer, whole or in pieces."""

  def __init__(self, model: str):
    self._common = {'id': f'chatcmpl-{uuid.uuid4().hex}',
                    'created': int(time.time()), 'model': model}

  def whole(self, reply: CoreReply, extension: dict) -> dict:
    refused = reply.finish == 'refused'
    message = {'role': 'assistant', 'content': None if refused else reply.text,
               'refusal': reply.text if refused else None}
    return {**self._common, 'object': 'chat.completion', 'choices': [
        {'index': 0, 'message': message, 'logprobs': None,
         'finish_reason': FINISH[reply.finish]}],
            'usage': usage(reply), 'exectune': extension}

  def first(self) -> bytes:
    return self._chunk({'role': 'assistant', 'content': ''})

  def piece(self, text: str) -> bytes:
    return self._chunk({'content': text})

  def rest(self, reply: CoreReply, sent: str) -> bytes:
    """What has not been sent yet: all of it if the core cannot stream."""
    if reply.finish == 'refused' and not sent:
      return self._chunk({'refusal': reply.text})
    more = reply.text.removeprefix(sent)
    return self.piece(more) if reply.text.startswith(sent) and more else b''

  def last(self, reply: CoreReply, extension: dict,
           include_usage: bool) -> bytes:
    ended = self._chunk({}, FINISH[reply.finish], exectune=extension)
    if include_usage:
      ended += event({**self._common, 'object': 'chat.completion.chunk',
                      'choices': [], 'usage': usage(reply)})
    return ended + b'data: [DONE]\n\n'

  def _chunk(self, delta: dict, finish: str | None = None, **more) -> bytes:
    return event({**self._common, 'object': 'chat.completion.chunk',
                  'choices': [{'index': 0, 'delta': delta,
                               'finish_reason': finish}], **more})


def event(data: dict) -> bytes:
  """One server-sent event."""
  return b'data: ' + json.dumps(data).encode() + b'\n\n'


def usage(reply: CoreReply) -> dict:
  """The core's tokens; the guide's are in the extension."""
  return {'prompt_tokens': reply.input_tokens,
          'completion_tokens': reply.output_tokens,
          'total_tokens': reply.input_tokens + reply.output_tokens,
          'prompt_tokens_details': {'cached_tokens': reply.cached_tokens},
          'completion_tokens_details': {
              'reasoning_tokens': reply.thinking_tokens}}
