"""The real adapters against a local server that speaks their wire formats."""

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web

from exectune_jax.cores.base import (CoreRequest, FatalError, Price,
                                     RequestError, RetryableError,
                                     UnreachableError)
from exectune_jax.cores.gemini import GeminiCore
from exectune_jax.cores.openai import OpenAICore
from exectune_jax.errors import UserError

REQUEST = CoreRequest((('system', 'be terse'), ('user', 'a'),
                       ('assistant', 'b'), ('user', '2 + 2?')), 0.5, 32,
                      ('\n',))


def serve(handler, use):
  """Runs `use(url)` against a loopback server; returns (result, requests)."""
  seen = []

  async def handle(http_request):
    seen.append((http_request.path, dict(http_request.headers),
                 await http_request.json()))
    return await handler(http_request)

  async def run():
    app = web.Application()
    app.router.add_post('/{tail:.*}', handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, '127.0.0.1', 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
      return await use(f'http://127.0.0.1:{port}')
    finally:
      await runner.cleanup()

  return asyncio.run(run()), seen


def answer(status=200, body=None, text=None, headers=None):
  async def handler(_):
    return web.Response(status=status, headers=headers,
                        text=text if text is not None else json.dumps(body),
                        content_type='application/json')
  return handler


async def reset(http_request):
  http_request.transport.close()
  return web.Response()


def call(make):
  async def use(url):
    core = make(url)
    try:
      return await core.generate(REQUEST)
    finally:
      await core.close()
  return use


def openai(url):
  return OpenAICore('m', url + '/v1', Price(1.0, 10.0))


def gemini(url):
  return GeminiCore('m', url, Price(1.0, 10.0))


def chat(content='4', reason='stop', refusal=None, usage=True):
  body = {'choices': [{'message': {'role': 'assistant', 'content': content,
                                   'refusal': refusal},
                       'finish_reason': reason}]}
  if usage:
    body['usage'] = {'prompt_tokens': 100, 'completion_tokens': 10}
  return body


def candidate(text='4', reason='STOP', **more):
  return {'candidates': [{'content': {'role': 'model',
                                      'parts': [{'text': text}]},
                          'finishReason': reason}],
          'usageMetadata': {'promptTokenCount': 100,
                            'candidatesTokenCount': 7,
                            'thoughtsTokenCount': 3}, **more}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
  monkeypatch.setenv('GEMINI_API_KEY', 'secret-key')
  monkeypatch.delenv('EXECTUNE_CORE_API_KEY', raising=False)


def test_openai_request_and_reply():
  reply, seen = serve(answer(body=chat()), call(openai))
  path, headers, body = seen[0]
  assert path == '/v1/chat/completions'
  assert 'Authorization' not in headers
  assert body == {
      'model': 'm', 'max_tokens': 32, 'temperature': 0.5, 'stop': ['\n'],
      'messages': [{'role': 'system', 'content': 'be terse'},
                   {'role': 'user', 'content': 'a'},
                   {'role': 'assistant', 'content': 'b'},
                   {'role': 'user', 'content': '2 + 2?'}]}
  assert (reply.text, reply.finish) == ('4', 'stop')
  assert (reply.input_tokens, reply.output_tokens) == (100, 10)
  assert reply.usd == pytest.approx((100 * 1 + 10 * 10) / 1e6)


def test_openai_key_never_goes_to_another_server(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', 'sk-real')
  monkeypatch.setenv('EXECTUNE_CORE_API_KEY', 'local-key')
  _, seen = serve(answer(body=chat()), call(openai))
  assert seen[0][1]['Authorization'] == 'Bearer local-key'


def test_gemini_request_and_reply():
  reply, seen = serve(answer(body=candidate()), call(gemini))
  path, headers, body = seen[0]
  assert path.endswith('/models/m:generateContent')
  assert headers['x-goog-api-key'] == 'secret-key'
  assert [c['role'] for c in body['contents']] == ['user', 'model', 'user']
  assert body['systemInstruction']['parts'][0]['text'] == 'be terse'
  assert body['generationConfig'] == {
      'temperature': 0.5, 'maxOutputTokens': 32, 'stopSequences': ['\n']}
  assert (reply.text, reply.finish) == ('4', 'stop')
  assert (reply.input_tokens, reply.output_tokens) == (100, 10)


@pytest.mark.parametrize('make, body, finish', [
    (openai, chat(reason='length'), 'length'),
    (openai, chat(None, 'length'), 'length'),
    (openai, chat(None, 'stop', 'I cannot'), 'refused'),
    (openai, chat('', 'content_filter'), 'refused'),
    (gemini, candidate(reason='MAX_TOKENS'), 'length'),
    (gemini, candidate(reason='SAFETY'), 'refused'),
    (gemini, {'promptFeedback': {'blockReason': 'SAFETY'}}, 'refused'),
])
def test_truncated_and_refused_are_answers(make, body, finish):
  reply, _ = serve(answer(body=body), call(make))
  assert reply.finish == finish


@pytest.mark.parametrize('make', [openai, gemini])
@pytest.mark.parametrize('status, error', [
    (429, RetryableError), (500, RetryableError), (503, RetryableError),
    (400, RequestError), (401, FatalError), (403, FatalError),
    (404, FatalError)])
def test_http_errors_are_classified(make, status, error):
  body = {'error': {'code': status, 'message': 'no', 'status': 'X'}}
  with pytest.raises(error) as caught:
    serve(answer(status, body), call(make))
  assert 'secret-key' not in str(caught.value)


@pytest.mark.parametrize('make, handler', [
    (openai, answer(text='<html>busy</html>')),
    (openai, answer(text='{"choices": [')), (openai, answer(body={})),
    (openai, answer(body=[])), (openai, answer(body=chat(reason=None))),
    (openai, reset),
    (openai, answer(body=chat(content=None))),
    (openai, answer(text='[' * 5000)),
    (gemini, answer(body={'candidates': 3})),
    (gemini, answer(text='<html>busy</html>')),
    (gemini, answer(text='{"candidates": [')), (gemini, answer(body={})),
    (gemini, answer(body=candidate(reason=None))), (gemini, reset),
])
def test_unreadable_replies_are_retryable_never_an_answer(make, handler):
  with pytest.raises(RetryableError):
    serve(handler, call(make))


def test_text_that_cannot_be_stored_is_cleaned():
  reply, _ = serve(answer(text=json.dumps(chat('4 \ud83d'))), call(openai))
  assert reply.text == '4 ?'


def test_gemini_says_400_for_a_wrong_key():
  body = {'error': {'code': 400, 'message': 'API key not valid.',
                    'status': 'INVALID_ARGUMENT'}}
  with pytest.raises(FatalError):
    serve(answer(400, body), call(gemini))


def test_cached_and_thinking_tokens_are_read():
  body = chat()
  body['usage'].update(prompt_tokens_details={'cached_tokens': 40},
                       completion_tokens_details={'reasoning_tokens': 6})
  reply, _ = serve(answer(body=body), call(lambda url: OpenAICore(
      'm', url, Price(1.0, 10.0, 0.1))))
  assert (reply.cached_tokens, reply.thinking_tokens) == (40, 6)
  assert reply.usd == pytest.approx((60 * 1 + 40 * 0.1 + 10 * 10) / 1e6)
  reply, _ = serve(answer(body=candidate()), call(gemini))
  assert reply.thinking_tokens == 3


def test_gemini_says_in_the_body_when_to_come_back():
  body = {'error': {'code': 429, 'message': 'quota', 'status': 'X', 'details': [
      {'@type': 'type.googleapis.com/google.rpc.RetryInfo',
       'retryDelay': '34s'}]}}
  with pytest.raises(RetryableError) as caught:
    serve(answer(429, body), call(gemini))
  assert caught.value.retry_after_s == 34.0
  assert caught.value.overload


def test_retry_after_is_read():
  with pytest.raises(RetryableError) as caught:
    serve(answer(429, {}, headers={'Retry-After': '7'}), call(openai))
  assert caught.value.retry_after_s == 7.0


@pytest.mark.parametrize('make', [openai, gemini])
def test_nobody_listens(make):
  with pytest.raises(UnreachableError):
    asyncio.run(call(make)('http://127.0.0.1:9'))


def test_missing_keys_name_the_variable(monkeypatch):
  monkeypatch.delenv('GEMINI_API_KEY')
  with pytest.raises(UserError, match='GEMINI_API_KEY'):
    GeminiCore('m', '', Price(0, 0))
  with pytest.raises(UserError, match='OPENAI_API_KEY'):
    OpenAICore('m', '', Price(0, 0))


def test_only_our_own_deadline_ends_a_slow_reply(monkeypatch):
  """aiohttp's, five minutes by default, does not."""
  monkeypatch.setattr('aiohttp.client.DEFAULT_TIMEOUT',
                      aiohttp.ClientTimeout(total=0.05))
  async def slow(_):
    await asyncio.sleep(0.3)
    return web.json_response(chat())
  reply, _ = serve(slow, call(openai))
  assert reply.text == '4'
