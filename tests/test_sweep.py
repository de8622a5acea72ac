"""Sweeps: what is tried, what fails, what is paid for once."""

import csv
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import UsageError, UserError
from launch import hyper, sweep

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
from configs import quickstart

def get_config(arg=''):
  config = quickstart.get_config('runlocal')
  config.stages = 'evaluate'
  config.evaluate.systems = ('core_alone', 'generic')
  config.core.name = 'toy:small?latency_s=LATENCY'
  return config

def get_hyper(hyper):
  return hyper.chain(hyper.sweep('evaluate.show_episodes', (0, 1)),
                     hyper.fixed('core.name', 'toy:tiny'),
                     hyper.fixed('evaluate.systems', "('core_alone',)"))
"""
NAMES = ['evaluate.show_episodes=0', 'evaluate.show_episodes=1',
         'core.name=toy_tiny', 'evaluate.systems=__core_alone_,_']


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'tried.py'
  path.write_text(CONFIG.replace('LATENCY', '0'))
  return path


def run(config, workdir, *more):
  return subprocess.run(
      [sys.executable, '-m', 'launch.sweep', f'--config={config}',
       f'--workdir={workdir}', *more], cwd=ROOT, capture_output=True, text=True)


def test_trials_are_combined():
  a, b = hyper.sweep('a', (1, 2)), hyper.sweep('b', 'xy')
  assert hyper.product(a, b) == [
      {'a': 1, 'b': 'x'}, {'a': 1, 'b': 'y'}, {'a': 2, 'b': 'x'},
      {'a': 2, 'b': 'y'}]
  assert hyper.zipped(a, b) == [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}]
  assert hyper.chain(a, hyper.fixed('c', 0)) == [{'a': 1}, {'a': 2}, {'c': 0}]
  chosen = hyper.subsample(hyper.sweep('a', range(100)), 5)
  assert len({t['a'] for t in chosen}) == 5
  assert chosen == sorted(chosen, key=lambda t: t['a'])
  assert chosen == hyper.subsample(hyper.sweep('a', range(100)), 5)
  with pytest.raises(ValueError, match='a is set twice'):
    hyper.product(a, a)
  with pytest.raises(ValueError):
    hyper.zipped(a, hyper.sweep('b', 'xyz'))


def test_a_failing_trial_stops_nobody_and_nothing_is_paid_twice(config,
                                                                tmp_path):
  workdir = tmp_path / 'w'
  done = run(config, workdir)
  assert done.returncode == 1
  rows = json.loads((workdir / 'sweep.json').read_text())
  assert [r['trial'] for r in rows] == NAMES
  assert [r['state'] == 'done' for r in rows] == [True, True, False, True]
  assert rows[2]['state'].startswith("failed: error: core.name='toy:tiny'")
  first, second, failed, fourth = rows
  assert first['paid_usd'] > 0 and first['saved_usd'] == 0
  assert (second['paid_usd'], second['saved_usd']) == (
      0, pytest.approx(first['paid_usd']))
  assert 0 < fourth['saved_usd'] < first['paid_usd']
  assert failed['accuracy'] is None
  for row in (first, second):  # of 'generic', the last of the systems
    report = json.loads((workdir / row['trial'] / 'report.json').read_text())
    assert row['accuracy'] == report['systems'][1]['accuracy']
    assert [row['low'], row['high']] == report['systems'][1]['ci95']
  ledger = Ledger(workdir / 'ledger.sqlite')
  assert ledger.spent_usd == pytest.approx(sum(r['paid_usd'] for r in rows))
  ledger.close()
  with (workdir / 'sweep.csv').open() as file:
    assert [r['trial'] for r in csv.DictReader(file)] == NAMES
  assert (workdir / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  saved = second['saved_usd'] + fourth['saved_usd']
  assert f'had made saved ${saved:.4f}' in done.stdout
  # the same command: what is done stays, what failed is tried again
  before = (workdir / NAMES[0] / 'log.txt').stat().st_mtime_ns
  config.write_text(config.read_text().replace('toy:tiny', 'toy:large'))
  (workdir / 'core.name=toy_large').mkdir()
  again = run(config, workdir, '--system=core_alone')
  assert again.returncode == 0, again.stdout
  assert (workdir / NAMES[0] / 'log.txt').stat().st_mtime_ns == before
  rows = json.loads((workdir / 'sweep.json').read_text())
  assert rows[0]['accuracy'] == rows[3]['accuracy'] != rows[2]['accuracy']


def test_a_stop_is_passed_on_and_the_sweep_goes_on(config, tmp_path):
  workdir = tmp_path / 'w'
  config.write_text(CONFIG.replace('LATENCY', '2').replace(
      "hyper.fixed('core.name', 'toy:tiny'),", ''))
  process = subprocess.Popen(
      [sys.executable, '-m', 'launch.sweep', f'--config={config}',
       f'--workdir={workdir}', '--config.core.concurrency=2'], cwd=ROOT,
      text=True, stdout=subprocess.PIPE)
  log = workdir / NAMES[0] / 'log.txt'
  while not (log.exists() and 'will ask for' in log.read_text()):
    assert process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 1
  states = [r['state'] for r in json.loads(
      (workdir / 'sweep.json').read_text())]
  assert states == ['stopped', 'not begun', 'not begun']
  assert 'stopping' in out


@pytest.mark.parametrize('name', ['sweep_pipeline', 'sweep_reward'])
def test_every_sweep_prints_commands_that_main_understands(name, tmp_path):
  config = f'configs/{name}.py'
  done = run(config, tmp_path / 'w', '--dry_run', '--config.seed=1')
  assert done.returncode == 0 and not (tmp_path / 'w').exists()
  trials = sweep.trials_of(config)
  lines = done.stdout.splitlines()
  assert len(lines) == len(trials) in (5, 9)
  for line, trial in zip(lines, trials, strict=True):
    assert '--config.seed=1' in line
    for field, value in trial.items():
      assert f'--config.{field}={value}' in line
  from configs import quickstart
  fields = quickstart.get_config()
  for trial in trials:  # a wrong field or type raises
    for field, value in trial.items():
      section, _, leaf = field.rpartition('.')
      fields[section][leaf] = value


def test_wrong_use_is_named(tmp_path, config):
  for flags, said in (
      ([f'--config={config}'], '--workdir are required'),
      (['--config=no.py', '--workdir=w'], "--config='no.py': there is no"),
      (['--config=configs/quickstart.py', '--workdir=w'], 'no get_hyper'),
      ([f'--config={config}', '--workdir=w', 'more'], "'more': only")):
    done = subprocess.run([sys.executable, '-m', 'launch.sweep', *flags],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr, done.stderr
  bad = tmp_path / 'bad.py'
  bad.write_text('def get_hyper(h):\n  return h.sweep("a", (1, 1))')
  with pytest.raises(UserError, match='the same trial twice'):
    sweep.trials_of(str(bad))
  with pytest.raises(UsageError):
    sweep.trials_of('nowhere.py')
