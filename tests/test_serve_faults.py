"""Endpoints under bad luck: cores and guides that fail, clients that leave,
budgets, limits, signals."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error

import openai
import pytest
from fake_providers import FakeProviders
from serving import QUESTION, chat, complete, get, make_config, served
from serving import trained as trained

from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import UserError
from exectune_jax.sampling.grid import Grid
from exectune_jax.stages import serve

ROOT = pathlib.Path(__file__).parents[1]


def alone(url):
  """Why the core answered alone."""
  status, data = complete(url)
  assert status == 200
  assert (data['exectune']['strategy'] is None) == bool(
      data['exectune']['alone'])
  return data['exectune']['alone']


def priced(name, **core):
  """A core of that name, at a dollar for a million tokens of any kind."""
  core.update(name=name, usd_per_1m_input=1.0, usd_per_1m_output=1.0)
  return make_config(**{f'core.{field}': v for field, v in core.items()})


def test_parameters_and_history_reach_the_core(trained, tmp_path, monkeypatch):
  monkeypatch.setenv('EXECTUNE_CORE_API_KEY', 'k')
  with FakeProviders(lambda text: 'fine') as fake:
    config = priced(f'openai:m@{fake.url}/v1', max_tokens=100)
    with served(trained[0], config, tmp_path) as url:
      status, data = get(f'{url}/v1/chat/completions', {
          'model': 'exectune', 'temperature': 0.5, 'max_tokens': 7,
          'stop': 'END', 'messages': [
              {'role': 'developer', 'content': 'Be brief.'},
              {'role': 'user', 'content': 'Hello'},
              {'role': 'assistant', 'content': 'Hi'},
              {'role': 'user', 'content': [{'type': 'text',
                                            'text': QUESTION}]}]})
      assert status == 200
      again = [get(f'{url}/v1/chat/completions',
                   chat(temperature=0.5, max_tokens=1000))[1]
               for _ in range(2)]
  (_, _, sent), *others = fake.requests
  strategy = data['exectune']['strategy']
  assert [m['role'] for m in sent['messages']] == [
      'system', 'user', 'assistant', 'user']
  assert sent['messages'][0]['content'] == 'Be brief.'
  assert sent['messages'][3]['content'] == (
      f'Problem: {QUESTION}\nStrategy: {strategy}')
  assert (sent['temperature'], sent['max_tokens'], sent['stop']) == (
      0.5, 7, ['END'])
  # Above temperature 0 every answer is a draw of its own; the limit holds.
  assert len(others) == 2 and not again[1]['exectune']['cached']
  assert others[0][2]['max_tokens'] == 100


def test_a_core_that_fails_is_an_error_that_clients_know(trained, tmp_path,
                                                         monkeypatch):
  monkeypatch.setenv('EXECTUNE_CORE_API_KEY', 'secret-key')
  with FakeProviders(lambda text: 'word ' * 9, 1.0, ('500',)) as fake:
    config = priced(f'openai:m@{fake.url}/v1', attempts=1)
    with served(trained[0], config, tmp_path) as url:
      client = openai.OpenAI(base_url=f'{url}/v1', api_key='none',
                             max_retries=0)
      ask = {'model': 'exectune',
             'messages': [{'role': 'user', 'content': QUESTION}]}
      with pytest.raises(openai.InternalServerError,
                         match='does not answer') as e:
        client.chat.completions.create(**ask)
      assert e.value.status_code == 502
      # nothing of ours: not the address, not the core's own words
      assert '127.0.0.1' not in str(e.value) and 'busy' not in str(e.value)
      with pytest.raises(openai.APIError, match='does not answer'):
        list(client.chat.completions.create(**ask, stream=True))
      fake.faults = ('truncated',)  # after the first pieces
      seen = []
      with pytest.raises(openai.APIError, match='does not answer'):
        for chunk in client.chat.completions.create(**ask, stream=True):
          seen.append(chunk.choices[0].delta.content)
      assert len(seen) >= 2
      text = get(f'{url}/metrics')[1]
      assert 'exectune_errors_total{status="502"} 3.0' in text


def test_a_temperature_that_the_core_lacks_is_the_clients_error(
    trained, tmp_path, monkeypatch):
  pytest.importorskip('anthropic')
  monkeypatch.setenv('ANTHROPIC_API_KEY', 'key')
  with FakeProviders(lambda text: 'fine') as fake:
    config = priced(f'anthropic:m@{fake.url}', temperature=1.0)
    with served(trained[0], config, tmp_path) as url:
      status, data = complete(url, temperature=0.3)
      assert (status, data['error']['param']) == (400, 'temperature')
      assert complete(url)[0] == 200


def test_the_budget_holds_and_says_so(trained, tmp_path):
  config = make_config(budget_usd=1e-6)
  with served(trained[0], config, tmp_path) as url:
    status, data = complete(url)
    assert (status, data['error']['code']) == (429, 'insufficient_quota')


def test_late_strategies_are_done_without(trained, tmp_path):
  config = make_config(**{'serve.deadline_s': 1e-4})
  with served(trained[0], config, tmp_path) as url:
    assert alone(url) == 'late'


def test_a_guide_that_fails_is_done_without_until_it_works(
    trained, tmp_path, monkeypatch, capfd):
  plain, broken = Grid.step, [True]
  with served(trained[0], make_config(), tmp_path) as url:
    def step(grid):
      if broken:
        raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')
      return plain(grid)
    monkeypatch.setattr(Grid, 'step', step)
    assert alone(url) == 'guide failed'
    broken.clear()
    assert alone(url) is None
  assert 'the core answers alone' in capfd.readouterr().err


def test_as_many_as_there_may_be_and_a_bill_of_them(trained, tmp_path):
  config = make_config(**{'core.name': 'toy:small?latency_s=1',
                          'serve.max_requests': 2})
  with served(trained[0], config, tmp_path) as url:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
      found = list(pool.map(
          lambda i: complete(url, question=f'{QUESTION} Really {i}?'),
          range(6)))
    good = [data for status, data in found if status == 200]
    assert sorted(status for status, _ in found) == [200] * 2 + [429] * 4
    text = get(f'{url}/metrics')[1]
    assert 'exectune_errors_total{status="429"} 4.0' in text
    count = sum(not d['exectune']['alone'] for d in good)
    assert f'exectune_answers_total{{alone=""}} {float(count)}' in text
    tokens = sum(d['usage']['completion_tokens'] for d in good)
    assert f'{{whose="core_output"}} {float(tokens)}' in text
    ledger = Ledger(tmp_path / 'ledger.sqlite')
    assert f'exectune_core_usd {ledger.spent_usd}' in text
    ledger.close()


@contextlib.contextmanager
def asking(url, body):
  """A raw request in progress; the client leaves with the block."""
  host, _, port = url.removeprefix('http://').partition(':')
  data = json.dumps(body).encode()
  with socket.create_connection((host, int(port)), timeout=60) as s:
    s.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n'
              b'Content-Length: %d\r\n\r\n%s' % (len(data), data))
    yield s


def until(found, seconds=60):
  deadline = time.monotonic() + seconds
  while not found():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_leaves_frees_its_place_and_what_is_paid_stays(
    trained, tmp_path, stream):
  config = make_config(**{'core.name': 'toy:small?latency_s=0.5'})
  with served(trained[0], config, tmp_path) as url:
    ledger = Ledger(tmp_path / 'ledger.sqlite')
    with asking(url, chat(stream=stream)):
      until(lambda: ledger.rows('SELECT * FROM flights'))
    until(lambda: not get(f'{url}/healthz')[1]['running'])
    until(ledger.count)
    ledger.close()
    assert complete(url)[1]['exectune']['cached']


def test_what_nobody_waits_for_is_not_bought(trained, tmp_path):
  """One call at a time; twenty clients queue behind it and leave."""
  config = make_config(**{'core.name': 'toy:small?latency_s=2',
                          'core.concurrency': 1, 'serve.max_requests': 30})
  with served(trained[0], config, tmp_path) as url:
    ledger = Ledger(tmp_path / 'ledger.sqlite')
    with asking(url, chat()):
      until(lambda: ledger.rows('SELECT * FROM flights'))
      with contextlib.ExitStack() as stack:
        for i in range(20):
          stack.enter_context(asking(url, chat(
              f'{QUESTION} Really {i}?', stream=i % 2 == 0)))
        until(lambda: get(f'{url}/healthz')[1]['running'] == 21)
      until(lambda: get(f'{url}/healthz')[1]['running'] == 1)
    until(ledger.count)
  assert ledger.count() == 1  # closed: nothing can come any more
  ledger.close()


def test_a_twin_of_a_stream_that_breaks_has_all_its_tries(trained, tmp_path,
                                                          monkeypatch):
  """Two clients, one question; the core breaks off the first try only."""
  monkeypatch.setenv('EXECTUNE_CORE_API_KEY', 'k')
  with FakeProviders(lambda text: 'word ' * 9, 1.0, ('slow truncated',)
                     ) as fake:
    config = priced(f'openai:m@{fake.url}/v1', attempts=2)
    with served(trained[0], config, tmp_path) as url:
      with asking(url, chat(stream=True)) as first:
        until(lambda: fake.requests)
        fake.rate = 0.0
        status, data = complete(url)
        text = b''
        while b'does not answer' not in text:
          text += first.recv(4096)
      assert status == 200
      assert data['choices'][0]['message']['content'] == 'word ' * 9
      assert len(fake.requests) == 2


def test_a_reply_that_cannot_be_written_blocks_nobody(trained, tmp_path,
                                                      monkeypatch):
  plain, full = Ledger._put_all, [True]
  def put_all(ledger, puts):
    ledger._mine.difference_update(p[0] for p in puts)
    if full:
      raise OSError('no space left')
    plain(ledger, puts)
  monkeypatch.setattr(Ledger, '_put_all', put_all)
  with served(trained[0], make_config(), tmp_path) as url:
    assert complete(url)[0] == 500
    full.clear()
    assert complete(url)[0] == 200  # the same question


def test_a_grid_that_cannot_be_made_again_is_tried_again(trained, tmp_path,
                                                         monkeypatch):
  from exectune_jax.sampling import sampler
  plain_step, plain_grid, broken = Grid.step, sampler.Grid, []
  def step(grid):
    if broken:
      raise RuntimeError('RESOURCE_EXHAUSTED')
    return plain_step(grid)
  def make(*args, **how):
    if broken:
      broken.pop()
      raise RuntimeError('RESOURCE_EXHAUSTED again')
    return plain_grid(*args, **how)
  with served(trained[0], make_config(), tmp_path) as url:
    monkeypatch.setattr(Grid, 'step', step)
    monkeypatch.setattr(sampler, 'Grid', make)
    broken += [1, 2, 3]
    assert alone(url) == 'guide failed'
    until(lambda: not broken)
    assert alone(url) is None


def test_tokens_and_addresses(trained, tmp_path, monkeypatch):
  config = make_config()
  config.serve.host = '0.0.0.0'
  with pytest.raises(UserError, match='EXECTUNE_SERVE_TOKEN'):
    serve.run(config, trained[0])
  monkeypatch.setenv('EXECTUNE_SERVE_TOKEN', 'a-token')
  with served(trained[0], config, tmp_path) as url:
    for path in ('/v1/models', '/metrics'):
      assert get(url + path)[0] == 401
      assert get(url + path, Authorization='Bearer a-toke')[0] == 401
      assert get(url + path, Authorization='Bearer a-token')[0] == 200
    assert complete(url)[0] == 401
    assert get(f'{url}/healthz')[0] == 200
    monkeypatch.setenv('EXECTUNE_SERVE_TOKEN', 'tökén')
    with pytest.raises(UserError, match='visible ASCII'):
      serve.run(config, trained[0])
    with pytest.raises(UserError, match='serve.port='):
      serve._listen(config.serve)


def test_sigterm_answers_what_it_has_and_ends_well(trained):
  """The command itself; a request is at the core when the signal comes."""
  workdir, _ = trained
  config = {'guide.max_new_tokens': 32, 'serve.guide': 'base',
            'serve.port': 0, 'serve.slots': 4, 'serve.deadline_s': 60.0,
            'core.name': 'toy:small?latency_s=2'}
  process = subprocess.Popen(
      [sys.executable, '-m', 'exectune_jax.main',
       '--config=configs/quickstart.py:runlocal', f'--workdir={workdir}',
       '--config.stages=serve',
       *(f'--config.{k}={v}' for k, v in config.items())], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  for line in process.stdout:
    if line.startswith('serving'):
      break
  url = line.split(' on ')[1].strip().removesuffix('/v1')
  found = []
  asking = threading.Thread(target=lambda: found.append(complete(url)))
  asking.start()
  while not get(f'{url}/healthz')[1]['running']:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  asking.join()
  assert found[0][0] == 200 and found[0][1]['choices'][0]['message']['content']
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and 'drained' in out
  with pytest.raises(urllib.error.URLError):
    get(f'{url}/healthz')
