"""One endpoint over HTTP: what it answers, and what it refuses."""

import concurrent.futures
import contextlib
import json
import socket

import openai
import pytest
from serving import (QUESTION, chat, complete, from_core, get, make_config,
                     served)
from serving import trained as trained


@pytest.fixture(scope='module')
def server(trained, tmp_path_factory):
  folder = tmp_path_factory.mktemp('server')
  with served(trained[0], make_config(), folder) as url:
    yield url


def test_batched_answers_are_those_of_one_at_a_time(trained, server):
  """Twelve problems at once through four slots, by OpenAI's client."""
  _, strategies = trained
  config = make_config()
  client = openai.OpenAI(base_url=f'{server}/v1', api_key='none')
  def one(question):
    return client.chat.completions.create(
        model='exectune', messages=[{'role': 'user', 'content': question}])
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    answers = list(pool.map(one, strategies))
  for (question, strategy), answer in zip(strategies.items(), answers,
                                          strict=True):
    core = from_core(config, question, strategy.body)
    found = answer.exectune
    assert answer.choices[0].message.content == core.text
    assert answer.choices[0].finish_reason == 'stop'
    assert found['strategy'] == strategy.body
    assert found['alone'] == (None if strategy.body else 'malformed')
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        core.input_tokens, core.output_tokens)
    assert found['usd'] == pytest.approx(
        core.usd + found['guide_tokens'] * config.guide.usd_per_1m_tokens / 1e6)
    assert found['guide_tokens'] > len(strategy.tokens)


@pytest.mark.parametrize('pens, how', [
    ('7', {'model': 'toy:small'}), ('8', {'exectune': {'guide': False}})])
def test_the_core_alone_on_request(server, pens, how):
  question = QUESTION.replace('6', pens)  # none of the two is in the ledger
  core = from_core(make_config(), question, None)
  for cached in (False, True):
    status, data = complete(server, question=question, **how)
    assert status == 200
    assert data['choices'][0]['message']['content'] == core.text
    assert data['exectune'] | {'seconds': 0} == {
        'guided': False, 'strategy': None, 'alone': 'asked for', 'seconds': 0,
        'core': 'toy:small', 'cached': cached, 'guide_tokens': 0,
        'guide_seconds': 0.0, 'usd': 0 if cached else pytest.approx(core.usd)}


def test_streams_bring_the_same_in_pieces(trained, server):
  client = openai.OpenAI(base_url=f'{server}/v1', api_key='none')
  question = QUESTION.replace('4', '5')
  chunks = list(client.chat.completions.create(
      model='exectune', messages=[{'role': 'user', 'content': question}],
      stream=True, stream_options={'include_usage': True}))
  *pieces, last, usage = chunks
  text = ''.join(c.choices[0].delta.content for c in pieces)
  assert len(pieces) > 3 and last.choices[0].finish_reason == 'stop'
  assert text == from_core(make_config(), question,
                           last.exectune['strategy']).text
  whole = client.chat.completions.create(
      model='exectune', messages=[{'role': 'user', 'content': question}])
  assert whole.choices[0].message.content == text
  assert usage.usage.total_tokens == whole.usage.total_tokens
  assert whole.exectune['cached'] and not last.exectune['cached']
  guide_usd = whole.exectune['guide_tokens'] * 0.02 / 1e6
  assert whole.exectune['usd'] == pytest.approx(guide_usd)


BAD = {
    'not JSON': (b'{"model"', 400, None),
    'no object': (b'[]', 400, None),
    'deep': (b'[' * 100_000, 400, None),
    'not UTF-8': (b'\xff\xfe{}', 400, None),
    'no model': ({'messages': []}, 404, 'model'),
    'another model': (chat(model='gpt-9'), 404, 'model'),
    'no messages': ({'model': 'exectune'}, 400, 'messages'),
    'empty': ({'model': 'exectune', 'messages': []}, 400, 'messages'),
    'role': ({'model': 'exectune', 'messages': [{'role': 'tool'}]}, 400,
             'messages[0]'),
    'picture': (chat([{'type': 'image_url', 'image_url': 'x'}]), 400,
                'messages[0]'),
    'number': (chat(7), 400, 'messages[0]'),
    'role that is a list': ({'model': 'exectune', 'messages': [
        {'role': [], 'content': 'a'}]}, 400, 'messages[0]'),
    'half a character': (chat('a \ud800 b'), 400, 'messages[0]'),
    'half a character in stop': (chat(stop='\ud800'), 400, 'stop'),
    'blank': (chat('  '), 400, 'messages'),
    'ends with the assistant': (
        {'model': 'exectune', 'messages': [
            {'role': 'user', 'content': 'a'},
            {'role': 'assistant', 'content': 'b'}]}, 400, 'messages'),
    'tools': (chat(tools=[{}]), 400, 'tools'),
    'n': (chat(n=2), 400, 'n'),
    'temperature': (chat(temperature=3), 400, 'temperature'),
    'nan': (json.dumps(chat(temperature=float('nan'))).encode(), 400,
            'temperature'),
    'max_tokens': (chat(max_tokens=0), 400, 'max_tokens'),
    'stop': (chat(stop=['']), 400, 'stop'),
    'stream': (chat(stream='yes'), 400, 'stream'),
    'guide': (chat(exectune={'guide': 'no'}), 400, 'guide'),
    'schema': (chat(response_format={'type': 'json_object'}), 400,
               'response_format'),
    'large': (chat('x' * 300_000), 413, None),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_request_says_what_is_wrong(server, name):
  body, status, param = BAD[name]
  found, data = get(f'{server}/v1/chat/completions', body)
  assert (found, data['error']['param']) == (status, param)
  assert data['error']['message'] and 'Traceback' not in str(data)
  assert get(f'{server}/healthz')[1] == {'status': 'ok', 'running': 0}


def test_a_large_body_without_a_length_is_cut_off(server):
  """Chunked, 10 MB announced by nobody."""
  host, _, port = server.removeprefix('http://').partition(':')
  with socket.create_connection((host, int(port))) as s:
    s.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n'
              b'Transfer-Encoding: chunked\r\n\r\n')
    with contextlib.suppress(OSError):
      for _ in range(160):
        s.sendall(b'10000\r\n' + b'x' * 65536 + b'\r\n')
    assert b' 413 ' in s.recv(100)


def test_web_pages_may_not_spend_without_a_token(server):
  for headers in ({'Host': 'evil.example'}, {'Origin': 'http://evil.example'},
                  {'Origin': 'null'}):
    assert get(f'{server}/v1/models', **headers)[0] == 403
    assert get(f'{server}/v1/chat/completions', chat(), **headers)[0] == 403
  assert get(f'{server}/v1/models', Origin='http://localhost:3000')[0] == 200


def test_other_routes_and_methods(server):
  assert get(f'{server}/v1/nothing')[0] == 404
  assert get(f'{server}/v1/chat/completions')[0] == 405
  names = [m['id'] for m in get(f'{server}/v1/models')[1]['data']]
  assert names == ['exectune', 'toy:small']


def test_what_is_too_long_for_the_guide_goes_to_the_core_alone(server):
  for question in ('word ' * 70 + '?', 'word ' * 5000):
    status, data = complete(server, question=question)
    assert (status, data['exectune']['alone']) == (200, 'too long')
