"""The benchmarks of the host side print one JSON line with their figures.

What the figures are is not tested here: machines differ.
"""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(name, *flags):
  done = subprocess.run([sys.executable, '-m', f'benchmarks.{name}', *flags],
                        cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  (line,) = done.stdout.splitlines()
  return json.loads(line)


def test_ledger():
  found = run('ledger', '--entries=20000')
  assert found['entries'] == 20000
  assert 0 < found['hit_p50_ms'] <= found['hit_p99_ms']


def test_throughput_of_the_client():
  assert run('reward_loop', '--only=throughput', '--calls=200'
             )['calls_per_s'] > 0


def test_sandbox():
  from exectune_jax.errors import UserError
  from exectune_jax.tasks import sandbox
  try:
    sandbox.probe(sandbox.Sandbox(5.0, 512), 'test')
  except UserError as e:
    pytest.skip(str(e))
  found = run('sandbox', '--programs=6', '--rounds=1')
  assert found['programs_per_s'] > 0 and found['x_plain_subprocess'] > 0


@pytest.mark.full
def test_serve():
  found = run('serve', '--rounds=1', '--seconds=1', '--latency_s=0.1',
              '--clients=4', '--slots=4', '--steps=60')
  assert found['direct']['p50_ms'] >= 100 and found['direct']['guided'] == 0
  assert found['alone']['guided'] == 0 and found['guided'] > 0.5
  assert found['p50_ms'] > found['direct']['p50_ms']
  assert found['added_p50_ms'] == pytest.approx(
      found['p50_ms'] - found['direct']['p50_ms'], abs=0.01)


@pytest.mark.full
def test_overlap():
  found = run('reward_loop', '--only=overlap', '--median_s=0.3',
              '--p99_s=0.6', '--steps=6', '--staleness=2')
  assert 0 < found['step_over_bound'] <= found['step_over_in_flight']
  assert found['speedup_vs_sync'] > 0
  for figures in (found, found['accelerator_bound']):
    assert 0 <= figures['idle_fraction'] < 1
