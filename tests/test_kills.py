"""Signals at random instants: the same command ends in the same place."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from test_resume import copy, make_config, prepared, same, state_of

from exectune_jax.cores.ledger import KILLED, Ledger
from exectune_jax.stages import collect, evaluate, rl

__all__ = ['prepared']  # a fixture
ROOT = pathlib.Path(__file__).parents[1]
STAGES = {'collect': collect, 'rl': rl, 'evaluate': evaluate}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
SOAK = [3, pytest.param(25, marks=pytest.mark.full)]

CHILD = """
import pathlib, sys
sys.path.insert(0, 'tests')
from test_kills import STAGES, slow_config
from exectune_jax import interrupt
from exectune_jax.errors import Stopped
interrupt.install(together=False)
print('started', flush=True)
try:
  STAGES[sys.argv[1]].run(slow_config(), pathlib.Path(sys.argv[2]))
except Stopped:
  sys.exit(7)
"""


def slow_config():
  config = make_config()
  config.core.name = 'toy:small?latency_s=0.2'
  config.core.concurrency = 4
  config.evaluate.systems = ('core_alone', 'generic', 'sft', 'exectune')
  return config


def interrupted(stage, workdir, times, rng, longest):
  """Runs a stage `times` times, each hit by a signal at a random instant.

  Returns how each ended: a signal's number, 7 for an orderly stop, 0 for done.
  """
  ends = []
  while len(ends) < times:
    child = subprocess.Popen(
        [sys.executable, '-c', CHILD, stage, str(workdir)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    while child.stdout.readline() != 'started\n':
      assert child.poll() is None
    time.sleep(rng.uniform(0, longest))
    child.send_signal(SIGNALS[len(ends) % len(SIGNALS)])
    child.stdout.read()
    ends.append(child.wait(60))
  return ends


def contents(workdir):
  """Keys and replies of a ledger, failed tries, and dollars."""
  ledger = Ledger(workdir / 'ledger.sqlite')
  calls = [tuple(r) for r in ledger.rows(
      'SELECT key, text, usd FROM calls ORDER BY key')]
  failed = [r['reason'] for r in ledger.rows('SELECT reason FROM failed')]
  spent = ledger.spent_usd
  ledger.close()
  return calls, failed, spent


def check_ledger(killed, whole, ends):
  """All calls once; only what was in flight at a kill -9 was made again."""
  calls, failed, spent = contents(killed)
  assert calls == contents(whole)[0]
  assert spent == pytest.approx(sum(usd for *_, usd in calls))
  assert set(failed) <= {KILLED}
  assert len(failed) <= 4 * ends.count(-signal.SIGKILL)  # core.concurrency


@pytest.mark.parametrize('times', SOAK)
def test_collect(tmp_path, times):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  whole.mkdir()
  killed.mkdir()
  collect.run(slow_config(), whole)
  ends = interrupted('collect', killed, times, random.Random(0), 1.5)
  collect.run(slow_config(), killed)
  assert collect.read(killed) == collect.read(whole)
  check_ledger(killed, whole, ends)
  assert -signal.SIGKILL in ends and 7 in ends


@pytest.mark.parametrize('times', SOAK)
def test_rl_and_evaluate(prepared, tmp_path, times):
  """Bitwise the same guide and episodes, then the same report."""
  whole, killed = (copy(prepared, tmp_path / n) for n in ('whole', 'killed'))
  for folder in (whole, killed):
    (folder / 'ledger.sqlite').unlink()
  rng = random.Random(1)
  rl.run(slow_config(), whole)
  ends = interrupted('rl', killed, times, rng, 8.0)
  rl.run(slow_config(), killed)
  same(state_of(killed), state_of(whole))
  check_ledger(killed, whole, ends)
  evaluate.run(slow_config(), whole)
  ends += interrupted('evaluate', killed, times, rng, 5.0)
  evaluate.run(slow_config(), killed)
  reports = [json.loads((w / 'report.json').read_text())
             for w in (whole, killed)]
  assert reports[0] == reports[1]
  check_ledger(killed, whole, ends)
