"""A trained tiny guide behind a real endpoint, for the tests of serving."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request

import filelock
import pytest

from configs import quickstart
from exectune_jax import interrupt
from exectune_jax.cores.base import CoreRequest
from exectune_jax.cores.toy import ToyCore
from exectune_jax.episode import Problem
from exectune_jax.learning.learner import Learner
from exectune_jax.stages import collect, serve, sft
from exectune_jax.tasks import load_problems, make_task

pytest.importorskip('uvicorn', reason="needs the extra 'serve'")
QUESTION = 'A shop has 4 boxes with 6 pens in each. How many pens are there?'


def make_config(**changes):
  """The quickstart, small; its base guide learns to write strategies."""
  config = quickstart.get_config('runlocal')
  config.compilation_cache = ''
  config.sft.update(data='proposed', init='', output='base', steps=60,
                    batch_size=16, learning_rate=3e-3)
  config.serve.update(guide='base', port=0, slots=4, deadline_s=60.0)
  config.core.deadline_s = 20.0
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir with a guide, and its greedy strategies of some problems."""
  # Trained once for all test processes of a run; each gets a copy.
  base = tmp_path_factory.getbasetemp()
  shared = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
            ) / 'trained'
  config = make_config()
  with filelock.FileLock(f'{shared}.lock'):
    if not (shared / 'done').exists():
      shared.mkdir()
      collect.run(config, shared)
      sft.run(config, shared)
      (shared / 'done').touch()
  workdir = tmp_path_factory.mktemp('served') / 'w'
  shutil.copytree(shared, workdir)
  learner = Learner(config, workdir, config.rl)
  problems = load_problems(make_task(config.task), 'test')
  strategies = {}
  for i, p in enumerate(problems):  # one by one: nothing is batched
    (s,) = learner.sampler.sample(
        learner.weights('base', 'test'), [learner.guide.prompt(p)], [i], 1,
        seed=0, temperature=0.0)
    strategies[p.question] = learner.guide.read(s.tokens, s.logprobs,
                                                s.complete)
  assert sum(s.body is not None for s in strategies.values()) >= 9
  return workdir, strategies


@contextlib.contextmanager
def served(workdir, config, tmp_path):
  """The stage in a thread; yields its address. Everything else is real."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    config.serve.port = s.getsockname()[1]
  config.ledger = str(tmp_path / 'ledger.sqlite')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(serve.run, config, workdir)
    url = f'http://127.0.0.1:{config.serve.port}'
    try:
      while not running.done():
        with contextlib.suppress(OSError):
          if get(f'{url}/healthz')[0] == 200:
            break
        time.sleep(0.02)
      if not running.done():
        yield url
    finally:
      interrupt._seen.append(signal.SIGTERM)
      running.result(timeout=60)
      assert not interrupt.requested()  # obeyed: the next stage may run


def get(url, body=None, **headers):
  """(status, JSON or text)."""
  data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
  request = urllib.request.Request(url, data, headers)
  try:
    with urllib.request.urlopen(request, timeout=60) as response:
      status, text = response.status, response.read().decode()
  except urllib.error.HTTPError as e:
    status, text = e.code, e.read().decode()
  try:
    return status, json.loads(text)
  except ValueError:
    return status, text


def chat(question=QUESTION, **more):
  return {'model': 'exectune', **more,
          'messages': [{'role': 'user', 'content': question}]}


def complete(url, **body):
  return get(f'{url}/v1/chat/completions', chat(**body))


def from_core(config, question, strategy):
  """What the toy core says to a strategy."""
  task = make_task(config.task)
  messages = task.core_messages(Problem('', question, ''), strategy)
  return asyncio.run(ToyCore('small').generate(
      CoreRequest.build(config.core, messages)))
