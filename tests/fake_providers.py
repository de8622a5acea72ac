"""A server with the wire formats of three providers, and their faults.

It answers every question through `answer(text of the last message)`. Each
request may be spoiled by one of FAULTS; which, is drawn from a seed and the
request's text and count, so that runs are repeatable. It keeps its own bill:
the tokens of every reply that reached the client whole with its usage.
"""

import asyncio
import collections
import json
import random

from aiohttp import web
from loopback import Loopback

EVENTS = 'text/event-stream'
IN, OUT = 100, 10  # tokens of every reply

FAULTS = ('429', '429 with retry-after', '500', '503', 'reset', 'hang',
          'drip', 'truncated', 'html', 'no finish', 'empty', 'refusal',
          'wrong usage')


class FakeProviders(Loopback):
  """Context manager; `url` is the server's address.

  Args:
    answer: from the last message's text to the reply's.
    rate: share of requests that are spoiled.
    faults: which kinds.
  """

  methods = 'POST'

  def __init__(self, answer, rate=0.0, faults=FAULTS, seed=0):
    self.answer, self.rate, self.faults, self.seed = answer, rate, faults, seed
    self.tries = collections.Counter()  # of each request
    self.seen = collections.Counter()  # faults given
    self.billed = 0  # replies with a usage that reached the client
    self.requests = []  # (path, headers, body)

  @property
  def usd(self):
    """The bill at a dollar for a million input, ten for output tokens."""
    return self.billed * (IN * 1.0 + OUT * 10.0) / 1e6

  async def handle(self, request):
    body = await request.json()
    self.requests.append((request.path, dict(request.headers), body))
    wire = next(w for mark, w in WIRES.items() if mark in request.path)
    text = wire.question(body)
    self.tries[text] += 1
    rng = random.Random(f'{self.seed}/{text}/{self.tries[text]}')
    fault = rng.choice(self.faults) if rng.random() < self.rate else ''
    self.seen[fault] += 1
    if fault in ('429', '429 with retry-after', '500', '503'):
      headers = {'Retry-After': '0.05'} if 'after' in fault else {}
      return web.json_response(
          {'error': {'code': int(fault[:3]), 'message': 'busy',
                     'status': 'X'}}, status=int(fault[:3]), headers=headers)
    if fault == 'reset':
      request.transport.close()
      return web.Response()
    if fault == 'hang':
      await asyncio.sleep(30)
    if fault == 'html':
      return web.Response(text='<html>busy</html>', content_type='text/html')
    if wire.streams(request.path, body):
      return await self._stream(request, wire.events(
          wire.reply(self.answer(text), fault)), fault)
    reply = json.dumps(wire.reply(self.answer(text), fault))
    if fault == 'drip':
      return await self._drip(request, reply)
    if fault == 'truncated':
      return web.Response(text=reply[:len(reply) // 2],
                          content_type='application/json')
    if fault != 'wrong usage':
      self.billed += 1
    return web.Response(text=reply, content_type='application/json')

  async def _stream(self, request, events, fault):
    """Server-sent events; 'truncated' ends in the middle of them."""
    response = web.StreamResponse(headers={'Content-Type': EVENTS})
    await response.prepare(request)
    for event in events[:2] if 'truncated' in fault else events:
      name = f'event: {event["type"]}\n' if 'type' in event else ''
      await response.write(f'{name}data: {json.dumps(event)}\n\n'.encode())
    if 'slow' in fault:
      await asyncio.sleep(1)
    if 'truncated' in fault:
      request.transport.close()
    elif fault != 'wrong usage':
      self.billed += 1
    return response

  async def _drip(self, request, reply):
    response = web.StreamResponse()
    response.content_length = len(reply.encode())
    await response.prepare(request)
    for byte in reply:
      await response.write(byte.encode())
      await asyncio.sleep(0.2)
    return response


class _Wire:

  @staticmethod
  def streams(path, body):
    return body.get('stream', False)


def pieces(text):
  """A text in pieces of three characters."""
  return [text[i:i + 3] for i in range(0, len(text or ''), 3)]


class Chat(_Wire):
  """OpenAI's chat completions."""

  @staticmethod
  def events(reply):
    (choice,), message = reply['choices'], reply['choices'][0]['message']
    deltas = [{'role': 'assistant', 'content': ''},
              *({'content': p} for p in pieces(message['content']))]
    if message['refusal']:
      deltas.append({'refusal': message['refusal']})
    end = {'choices': [{'delta': {}, 'finish_reason': choice['finish_reason']}]}
    return [*({'choices': [{'delta': d, 'finish_reason': None}]}
              for d in deltas), end, {'choices': [], 'usage': reply['usage']}]

  @staticmethod
  def question(body):
    return body['messages'][-1]['content']

  @staticmethod
  def reply(text, fault):
    message = {'role': 'assistant', 'content': text, 'refusal': None}
    reason = 'stop'
    if fault == 'no finish':
      reason = None
    elif fault == 'empty':
      message['content'] = None
    elif fault == 'refusal':
      message.update(content=None, refusal='I cannot')
    usage = {'prompt_tokens': IN, 'completion_tokens': OUT}
    if fault == 'wrong usage':
      usage = {'prompt_tokens': -1, 'completion_tokens': 'ten'}
    return {'choices': [{'message': message, 'finish_reason': reason}],
            'usage': usage}


class Responses(_Wire):
  """OpenAI's responses."""

  @staticmethod
  def events(reply):
    text = ''.join(p.get('text', '') for item in reply['output']
                   for p in item.get('content', ()))
    return [{'type': 'response.created', 'response': {}},
            *({'type': 'response.output_text.delta', 'delta': p}
              for p in pieces(text)),
            {'type': 'response.completed', 'response': reply}]

  @staticmethod
  def question(body):
    return body['input'][-1]['content']

  @staticmethod
  def reply(text, fault):
    part = {'type': 'output_text', 'text': text, 'annotations': []}
    if fault == 'refusal':
      part = {'type': 'refusal', 'refusal': 'I cannot'}
    output = [{'type': 'reasoning', 'summary': []},
              {'type': 'message', 'role': 'assistant', 'content': [part]}]
    usage = {'input_tokens': IN, 'output_tokens': OUT,
             'input_tokens_details': {'cached_tokens': 0},
             'output_tokens_details': {'reasoning_tokens': 0}}
    if fault == 'wrong usage':
      usage = {'input_tokens': 1e300, 'output_tokens': None}
    return {'status': None if fault == 'no finish' else 'completed',
            'output': output[:1] if fault == 'empty' else output,
            'usage': usage}


class Claude(_Wire):
  """Anthropic's messages."""

  @staticmethod
  def events(reply):
    text = ''.join(b['text'] for b in reply['content'])
    usage = reply['usage']
    start = {**reply, 'content': [], 'stop_reason': None,
             'usage': {**usage, 'output_tokens': 1}}
    return [{'type': 'message_start', 'message': start},
            {'type': 'content_block_start', 'index': 0,
             'content_block': {'type': 'text', 'text': ''}},
            *({'type': 'content_block_delta', 'index': 0,
               'delta': {'type': 'text_delta', 'text': p}}
              for p in pieces(text)),
            {'type': 'content_block_stop', 'index': 0},
            {'type': 'message_delta', 'usage': usage,
             'delta': {'stop_reason': reply['stop_reason'],
                       'stop_sequence': None}}, {'type': 'message_stop'}]

  @staticmethod
  def question(body):
    return body['messages'][-1]['content']

  @staticmethod
  def reply(text, fault):
    usage = {'input_tokens': IN, 'output_tokens': OUT}
    if fault == 'wrong usage':
      usage = {'input_tokens': -5, 'output_tokens': -7}
    reason = {'no finish': None, 'refusal': 'refusal',
              'empty': None}.get(fault, 'end_turn')
    return {'id': 'm', 'type': 'message', 'role': 'assistant', 'model': 'm',
            'content': [] if fault in ('empty', 'refusal') else [
                {'type': 'text', 'text': text}],
            'stop_reason': reason, 'stop_sequence': None, 'usage': usage}


class Gemini(_Wire):
  """Google's generateContent."""

  @staticmethod
  def streams(path, body):
    return 'stream' in path

  @staticmethod
  def events(reply):
    if not reply['candidates'] or 'content' not in reply['candidates'][0]:
      return [reply]
    candidate = reply['candidates'][0]
    text = candidate['content']['parts'][0]['text']
    parts = [{'candidates': [{'content': {'role': 'model', 'parts': [
        {'text': p}]}}]} for p in pieces(text)]
    end = {k: v for k, v in candidate.items() if k == 'finishReason'}
    return [*parts, {**reply, 'candidates': [{
        'content': {'role': 'model', 'parts': [{'text': ''}]}, **end}]}]

  @staticmethod
  def question(body):
    return body['contents'][-1]['parts'][0]['text']

  @staticmethod
  def reply(text, fault):
    usage = {'promptTokenCount': IN, 'candidatesTokenCount': OUT}
    if fault == 'wrong usage':
      usage = {'promptTokenCount': -1, 'candidatesTokenCount': -1}
    if fault == 'empty':
      return {'candidates': [], 'usageMetadata': usage}
    candidate = {'content': {'role': 'model', 'parts': [{'text': text}]},
                 'finishReason': 'STOP'}
    if fault == 'no finish':
      del candidate['finishReason']
    elif fault == 'refusal':
      candidate = {'finishReason': 'SAFETY'}
    return {'candidates': [candidate], 'usageMetadata': usage}


WIRES = {'chat/completions': Chat, 'responses': Responses,
         'messages': Claude, 'enerateContent': Gemini}
