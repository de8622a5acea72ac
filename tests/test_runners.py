"""Sweeps on other machines: TPU VMs through a gcloud whose workers are
directories, SkyPilot through a stand-in that runs the job here."""

import json
import os
import pathlib
import subprocess
import sys

import fake_gcloud
import pytest
from test_sweep import CONFIG

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ['evaluate.show_episodes=0', 'evaluate.show_episodes=1',
         'core.name=toy_tiny']
# A worker's Python is ours; only Cloud TPU's own coordination is not there.
TRAIN = f'''#!/bin/bash
export JAX_PLATFORMS=cpu
exec {sys.executable} "${{@/--config.mesh.hosts=0/--config.mesh.hosts=1}}"
'''
SKY = f'''#!{sys.executable}
import os, subprocess, sys
open(os.environ['FAKE'] + '/calls', 'a').write(repr(sys.argv[1:]) + '\\n')
env = dict(v.split('=', 1) for k, v in zip(sys.argv, sys.argv[1:])
           if k == '--env')
sys.exit(subprocess.run(
    [sys.executable, '-m', 'exectune_jax.main', '--config', env['CONFIG'],
     '--workdir', env['WORKDIR'], *env['ARGS'].split()],
    env={{**os.environ, 'XDG_CACHE_HOME': env['WORKDIR'][7:] + '.disk'}},
    ).returncode)
'''


@pytest.fixture
def elsewhere(tmp_path):
  """elsewhere(*flags) -> finished sweep, its rows, its bucket."""
  fake = tmp_path / 'fake'
  path = fake_gcloud.install(fake, TRAIN, sky=SKY)
  fake_gcloud.plan(fake)
  config = tmp_path / 'tried.py'
  config.write_text(CONFIG.replace('LATENCY', '0').replace(
      ",\n                     hyper.fixed('evaluate.systems', "
      '"(\'core_alone\',)")', ''))
  workdir = tmp_path / 'my_sweep'

  def run(*flags):
    done = subprocess.run(
        [sys.executable, '-m', 'launch.sweep', f'--config={config}',
         f'--workdir={workdir}', f'--bucket=file://{tmp_path}/bucket', *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={
            **os.environ, 'PATH': f'{path}:{os.environ["PATH"]}',
            'FAKE': str(fake), 'STATE': str(tmp_path / 'state'),
            'POLL_S': '0.3', 'GEMINI_API_KEY': 'sk-secret'})
    rows = workdir / 'sweep.json'
    return done, (json.loads(rows.read_text()) if rows.exists() else None)
  run.fake = fake
  return run


@pytest.mark.parametrize('runner', ['tpu_vm', 'sky'])
def test_trials_elsewhere_share_a_ledger_and_come_back(elsewhere, runner):
  done, rows = elsewhere(f'--runner={runner}')
  assert [r['trial'] for r in rows] == NAMES, done.stderr
  assert [r['state'].partition(':')[0] for r in rows] == [
      'done', 'done', 'failed'], done.stdout
  first, second, failed = rows
  assert first['accuracy'] == second['accuracy'] is not None
  assert (second['paid_usd'], second['saved_usd']) == (
      0, pytest.approx(first['paid_usd']))
  assert "core.name='toy:tiny'" in failed['state']
  calls = (elsewhere.fake / 'calls').read_text()
  assert 'sk-secret' not in calls
  if runner == 'sky':
    assert "'--secret', 'GEMINI_API_KEY'" in calls
    return
  verbs = [' '.join(json.loads(c)[2:4]) for c in calls.splitlines()]
  assert verbs.count('queued-resources create') == 1  # one place, one machine
  assert verbs[-1] == 'queued-resources delete'


def test_a_dry_run_shows_every_command(elsewhere):
  done, _ = elsewhere('--runner=tpu_vm', '--dry_run', '--jobs=2',
                      '--machine=--spot --zone z')
  lines = [x.split() for x in done.stdout.splitlines()]
  assert [x[:3] for x in lines] == [
      ['launch/tpu_vm.sh', verb, f'sweep-my-sweep-{slot}']
      for verb, slot in (('create', 0), ('setup', 0), ('create', 1),
                         ('setup', 1), ('run', 0), ('run', 1), ('run', 0),
                         ('delete', 0), ('delete', 1))]
  assert lines[0][3:] == ['--spot', '--zone', 'z']
  assert not (elsewhere.fake / 'calls').exists()


@pytest.mark.parametrize('flags, said', [
    (('--runner=tpu_vm', '--bucket='), '--bucket='),
    (('--runner=sky', '--config.task.data_dir=/a b'), 'spaces')])
def test_mistakes(elsewhere, flags, said):
  done, _ = elsewhere(*flags)
  assert done.returncode in (1, 2) and said in done.stderr
  assert done.stderr.count('\n') == 1
