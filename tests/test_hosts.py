"""Two processes with two devices each, against one process with four."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from exectune_jax.cores.ledger import Ledger, path_of
from exectune_jax.errors import UserError
from exectune_jax.learning import hosts

ROOT = pathlib.Path(__file__).parents[1]


def start(workdir, devices, count=1, index=0, address='', *more, **env):
  env = dict(os.environ, JAX_PLATFORMS='cpu', NPROC='32', **env,
             JAX_COORDINATOR_ADDRESS=address, JAX_PROCESS_ID=str(index),
             XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}')
  return subprocess.Popen(
      [sys.executable, '-m', 'exectune_jax.main',
       '--config=configs/quickstart.py:runlocal', f'--workdir={workdir}',
       '--config.compilation_cache=', f'--config.mesh.hosts={count}',
       '--config.mesh.data=2', '--config.mesh.fsdp=2', '--config.rl.groups=4',
       '--config.rl.max_staleness=0', '--config.rl.kl=0.1', *more],
      cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE)


def finish(processes):
  """Outputs; a process that hangs is killed (SIGTERM would be swallowed)."""
  try:
    outputs = [p.communicate(timeout=200) for p in processes]
  finally:
    for p in processes:
      p.kill()
  for p, (_, err) in zip(processes, outputs, strict=True):
    assert p.returncode == 0, err[-3000:]
  return [out for out, _ in outputs]


def free_address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def metrics(workdir, guide):
  text = (workdir / 'guides' / guide / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_two_processes_do_what_one_does(tmp_path):
  """The whole recipe: losses, gradients, rewards, report and export. The two
  have no disk in common, but a bucket."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  stages = ('--config.stages=collect,sft:base,rl,evaluate,export',
            '--config.rl.init=base', '--config.evaluate.alpha_samples=0',
            "--config.evaluate.systems=('core_alone','exectune')")
  finish([start(one, 4, 1, 0, '', *stages)])
  address = free_address()
  first, second = finish([
      start(f'file://{two}', 2, 2, i, address, *stages,
            XDG_CACHE_HOME=str(tmp_path / f'disk{i}')) for i in (0, 1)])
  assert 'core_alone' in first and 'core_alone' not in second
  for guide in ('base', 'exectune'):
    a, b = metrics(one, guide), metrics(two, guide)
    assert len(a) == len(b) == 2
    for x, y in zip(a, b, strict=True):
      for name in x:
        if not name.startswith(('seconds', 'usd', 'idle')):
          assert y[name] == pytest.approx(x[name], rel=1e-4, abs=1e-6), name
  # each asked the core about its own groups
  assert list((two / 'ledger/host1').iterdir())
  files = [two / 'episodes' / name for name in (
      'exectune.jsonl', 'exectune.1.jsonl')]
  groups = [{json.loads(x)['group'] for x in f.read_text().splitlines()}
            for f in files]
  assert groups == [{0, 1, 4, 5}, {2, 3, 6, 7}]
  reports = [json.loads((w / 'report.json').read_text()) for w in (one, two)]
  assert reports[0]['systems'] == reports[1]['systems']
  from safetensors.numpy import load_file
  weights = [load_file(w / 'export/exectune/model.safetensors')
             for w in (one, two)]
  for name, value in weights[0].items():
    np.testing.assert_allclose(weights[1][name], value, atol=1e-4)


def test_a_slow_core_of_one_process_holds_up_but_does_not_block(tmp_path):
  """Its groups come late or past the deadline; all train on what there is."""
  stages = ('--config.stages=collect,rl', '--config.rl.init=',
            '--config.rl.steps=3', '--config.rl.max_staleness=1',
            '--config.rl.deterministic=False', '--config.rl.replace=1',
            '--config.rl.deadline_s=4')
  address = free_address()
  finish([start(tmp_path, 2, 2, i, address, *stages,
                '--config.core.name=toy:small?latency_s='
                f'{(0.01, 3.0)[i]}&spread={(0.0, 0.5)[i]}')
          for i in (0, 1)])
  rows = metrics(tmp_path, 'exectune')
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert max(row['seconds_core'] for row in rows) > 1.0  # mean of the two
  for index, owned in enumerate(({0, 1}, {2, 3})):
    part = f'.{index}' if index else ''
    episodes = [json.loads(line) for line in (
        tmp_path / f'episodes/exectune{part}.jsonl').read_text().splitlines()]
    assert {e['group'] % 4 for e in episodes} == owned
    places = [e['group'] % 12 for e in episodes]
    assert set(places) == {n for n in range(12) if n % 4 in owned}


def test_missing_addresses_name_the_variable(monkeypatch):
  monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
  with pytest.raises(UserError, match='mesh.hosts=2.*JAX_COORDINATOR_ADDRESS'):
    hosts.join(2)


@pytest.mark.parametrize('shared, spent, sharers, limits', [
    ('', (0.5, 0.1), 2, (0.7, 0.3)),  # 0.4 are left for both
    ('', (0.5, 0.1), 1, (0.9, 0.5)),  # or for the one that asks
    ('file:///ledger', (0.6, 0.6), 2, (0.8, 0.8)),  # both know all bills
    ('', (0.9, 0.2), 2, (0.85, 0.15)),  # more than there was
    ('', (0.3, None), 1, (0.5, 0.7))])  # None: 0.5 at most, nobody knows
def test_the_budget_is_what_all_have_left(config, tmp_path, monkeypatch, shared,
                                          spent, sharers, limits):
  config.budget_usd, config.ledger = 1.0, shared
  for host, usd in enumerate(spent):
    ledger = Ledger(path_of(config, tmp_path, host))
    ledger.begin('k', 'c', 's', 0.5)
    ledger.fail('k', 'c', 's', 'paid for nothing', usd)
    ledger.close()
  monkeypatch.setattr(hosts, 'count', lambda: 2)
  monkeypatch.setattr(hosts, 'gather_json', lambda own: [
      0.5 if s is None else s for s in spent])
  for host, limit in enumerate(limits):
    monkeypatch.setattr(hosts, 'index', lambda host=host: host)
    assert hosts.budget(config, tmp_path, sharers) == pytest.approx(limit)


def test_means_are_over_those_that_know(monkeypatch):
  monkeypatch.setattr(hosts, 'gather_json', lambda _: [
      [3, 0.5, 1.0], [1, 0.1, 0.0], [0, 0.0, 0.0]])
  assert hosts.mean({'a': 0.5, 'b': 1.0}, 3) == pytest.approx(
      {'a': 0.4, 'b': 0.75})
  monkeypatch.setattr(hosts, 'gather_json', lambda _: [[0, 0.0], [0, 0.0]])
  assert hosts.mean({'a': 0.0}, 0) == {}


def test_one_process_decides_alone():
  assert hosts.gather([1, 2]).tolist() == [[1, 2]]
  assert hosts.gather_json({'a': 1}) == [{'a': 1}]
  assert hosts.agree(True) and not hosts.agree(False)
