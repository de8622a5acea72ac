"""launch/tpu_vm.sh against a gcloud whose workers are directories: the
commands for the workers really run, only Python and pip are stand-ins."""

import json
import os
import pathlib
import shlex
import stat
import subprocess

import fake_gcloud
import pytest

ROOT = pathlib.Path(__file__).parents[1]
RUN = ('run', 'demo', '--', '--config', 'configs/gsm8k.py', '--workdir',
       'gs://bucket/a run', '--config.core.name=a b')
TRAIN = '''#!/bin/bash
printf '%s\\n' "$@" >>"$HOME/arguments"
echo "${GEMINI_API_KEY:-none}" >>"$HOME/key"
trap 'echo saved >>"$HOME/signals"; exit 1' TERM
read -r seconds code <"$HOME/behaviour"
for _ in $(seq $((seconds * 20))); do sleep 0.05; done
echo "this run ends with $code"
exit "$code"
'''


@pytest.fixture
def cloud(tmp_path):
  """cloud(*arguments, **scenario) -> finished process."""
  fake = tmp_path / 'fake'
  path = fake_gcloud.install(fake, TRAIN)

  def run(*arguments, timeout=120, **scenario):
    if scenario:
      fake_gcloud.plan(fake, **scenario)
    return subprocess.run(
        [ROOT / 'launch/tpu_vm.sh', *arguments], text=True,
        capture_output=True, timeout=timeout, env={
            'PATH': f'{path}:{os.environ["PATH"]}', 'FAKE': str(fake),
            'HOME': str(tmp_path), 'STATE': str(tmp_path / 'state'),
            'POLL_S': '0.3', 'RETRIES': '6', 'GEMINI_API_KEY': 'sk-se cret'})
  run.fake = fake
  return run


def calls(cloud, *what):
  """The calls of gcloud that begin with words."""
  rows = [json.loads(r) for r in (cloud.fake / 'calls').read_text(
  ).splitlines()]
  return [r for r in rows if r[2:2 + len(what)] == list(what)]


def ready(cloud, *flags, **scenario):
  for step in (('create', 'demo', *flags), ('setup', 'demo')):
    done = cloud(*step, **scenario)
    assert done.returncode == 0, done.stderr
    scenario = {}


def test_create_waits_and_later_commands_know_what_it_was_told(cloud):
  done = cloud('create', 'demo', '--type', 'v5litepod-8', '--zone', 'z',
               '--project', 'p', '--spot', waits=['ACCEPTED', 'PROVISIONING'])
  assert done.returncode == 0 and done.stdout.splitlines() == [
      'demo: ACCEPTED', 'demo: PROVISIONING']
  (create,) = calls(cloud, 'queued-resources', 'create')
  assert create[4:] == [
      'demo', '--node-id', 'demo', '--accelerator-type', 'v5litepod-8',
      '--runtime-version', 'v2-alpha-tpuv5-lite', '--spot', '--zone', 'z',
      '--project', 'p']
  assert cloud('delete', 'demo').returncode == 0
  assert calls(cloud, 'queued-resources', 'delete') == [
      ['compute', 'tpus', 'queued-resources', 'delete', 'demo', '--force',
       '--quiet', '--zone', 'z', '--project', 'p']]


def test_keys_travel_in_a_private_file_only(cloud):
  ready(cloud, runs=[[[0, 0], [0, 0]]])
  for worker in ('worker0', 'worker1'):
    keys = cloud.fake / 'machine0' / worker / 'exectune.keys'
    assert keys.read_text() == 'export GEMINI_API_KEY=sk-se\\ cret\n'
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert (keys.parent / 'exectune/setup.py').read_text() == subprocess.run(
        ['git', 'show', 'HEAD:setup.py'], cwd=ROOT, capture_output=True,
        text=True).stdout
  assert cloud(*RUN).returncode == 0
  assert (keys.parent / 'key').read_text() == 'sk-se cret\n'
  assert 'cret' not in (cloud.fake / 'calls').read_text()
  (scp,) = calls(cloud, 'tpu-vm', 'scp')
  assert not pathlib.Path(scp[4]).parent.exists()  # nothing stays here


@pytest.mark.parametrize('count', [1, 4])
def test_one_command_runs_on_all_workers_and_keeps_their_words(cloud, count):
  ready(cloud, runs=[[[1, 0]] * count])
  done = cloud(*RUN)
  assert (done.returncode, done.stdout) == (0, 'demo: done\n')
  for i in range(count):
    home = cloud.fake / f'machine0/worker{i}'
    assert (home / 'arguments').read_text().splitlines() == [
        '-m', 'exectune_jax.main', *RUN[3:], '--config.mesh.hosts=0']
  status = cloud('status', 'demo')
  assert status.stdout.splitlines() == ['ACTIVE', *['done'] * count]


def test_a_preemption_in_the_middle_begins_again(cloud):
  """Two machines are taken away; the quota is used up in between."""
  ready(cloud, '--spot', '--zone', 'z', preempt=[2, 2, 0],
        create=['ok', 'RESOURCE_EXHAUSTED: quota', 'ok', 'ok'],
        runs=[[[60, 0]] * 2, [[60, 0]] * 2, [[1, 0]] * 2])
  done = cloud(*RUN)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert [x.partition(';')[0] for x in lines if 'preempted' in x
          or 'not yet' in x] == [
      'demo: preempted', 'demo: not yet', 'demo: preempted', 'demo: preempted']
  assert lines[-1] == 'demo: done'
  created = calls(cloud, 'queued-resources', 'create')
  assert all('--spot' in c and c[c.index('--zone') + 1] == 'z'
             for c in created) and len(created) == 4
  for i in range(3):  # set up anew each time, the same command each time
    for worker in ('worker0', 'worker1'):
      home = cloud.fake / f'machine{i}' / worker
      assert (home / 'arguments').read_text().splitlines()[2:-1] == list(
          RUN[3:])


def test_it_gives_up_after_so_many_losses(cloud):
  ready(cloud, preempt=[1] * 9, runs=[[[60, 0]]] * 9)
  done = cloud(*RUN)
  assert done.returncode == 1
  assert 'error: demo: lost more than 6 times' in done.stderr


def test_one_worker_that_fails_stops_the_others_and_shows_why(cloud):
  ready(cloud, runs=[[[60, 0], [1, 7], [60, 0]]])
  done = cloud(*RUN)
  assert done.returncode == 1
  assert 'running, failed 7, running; the same command goes on' in done.stderr
  assert 'this run ends with 7' in done.stdout
  for i in (0, 2):
    signals = cloud.fake / f'machine0/worker{i}/signals'
    assert signals.read_text() == 'saved\n'
  assert len(calls(cloud, 'queued-resources', 'create')) == 1


def test_the_same_command_watches_and_stop_lets_it_save(cloud):
  ready(cloud, runs=[[[60, 0]]])
  watcher = subprocess.Popen(
      [ROOT / 'launch/tpu_vm.sh', *RUN], text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, env={
          'PATH': f'{cloud.fake / "operator"}:{os.environ["PATH"]}',
          'FAKE': str(cloud.fake), 'POLL_S': '0.3',
          'HOME': str(cloud.fake), 'STATE': str(cloud.fake / '../state')})
  home = cloud.fake / 'machine0/worker0'
  while not (home / 'arguments').exists():
    assert watcher.poll() is None
  watcher.kill()  # the laptop closes
  watcher.wait()
  assert cloud('status', 'demo').stdout == 'ACTIVE\nrunning\n'
  assert cloud('stop', 'demo').returncode == 0
  assert (home / 'signals').read_text() == 'saved\n'
  assert cloud('status', 'demo').stdout == 'ACTIVE\nfailed 1\n'
  (home / 'behaviour').write_text('0 0')
  assert cloud(*RUN).stdout == 'demo: done\n'  # it goes on from there
  assert (home / 'arguments').read_text().count('exectune_jax.main') == 2


def test_a_network_that_is_down_for_a_moment_costs_no_machine(cloud):
  """Of the looks at the run, four fail, and so do those at the machine."""
  ready(cloud, runs=[[[2, 0]]], down=[7, 8, 9, 10])
  done = cloud(*RUN)
  assert done.stdout == 'demo: done\n', done.stdout
  assert len(calls(cloud, 'queued-resources', 'create')) == 1
  assert not calls(cloud, 'queued-resources', 'delete')


def test_a_machine_without_our_code_is_set_up(cloud):
  """As after a preemption whose set-up met a network that was down."""
  assert cloud('create', 'demo', runs=[[[1, 0]] * 2]).returncode == 0
  done = cloud(*RUN)
  assert done.returncode == 0, done.stderr
  assert len(calls(cloud, 'tpu-vm', 'scp')) == 1


def test_another_run_on_the_same_machine_is_not_taken_for_the_first(cloud):
  ready(cloud, runs=[[[1, 0]]])
  assert cloud(*RUN).returncode == 0
  home = cloud.fake / 'machine0/worker0'
  (home / 'behaviour').write_text('60 0')
  other = (*RUN, '--config.seed=1')
  started = cloud('run', 'demo', '--dry-run', *other[2:])
  assert '--config.seed=1' in started.stdout
  with pytest.raises(subprocess.TimeoutExpired):
    cloud(*other, timeout=4)  # runs, and is not "done"
  assert 'running' in cloud('status', 'demo').stdout
  (home / 'behaviour').write_text('0 0')
  done = cloud(*RUN, '--config.seed=2')  # ends the other one first
  assert done.stdout == 'demo: done\n'
  assert (home / 'signals').read_text() == 'saved\n'


def test_a_machine_that_is_there_is_taken_up(cloud):
  ready(cloud, runs=[[[1, 0]]])
  assert cloud('create', 'demo').returncode == 0
  assert len(calls(cloud, 'queued-resources', 'create')) == 1


@pytest.mark.parametrize('arguments, said', [
    (('create', 'De;mo'), "NAME='De;mo'"), (('create', 'demo', '--zone'),
                                            '--zone: needs a value'),
    (('create', 'demo', '--cheap'), "'--cheap': unknown"),
    (('run', 'demo', '--', '--config', 'x'), '--workdir gs://BUCKET/DIR')])
def test_mistakes_are_one_line(cloud, arguments, said):
  done = cloud(*arguments)
  assert done.returncode == 1 and said in done.stderr
  assert done.stderr.count('\n') == 1 and not (cloud.fake / 'calls').exists()


def test_quota_is_the_providers_own_words(cloud):
  done = cloud('create', 'demo', create=['RESOURCE_EXHAUSTED: v6e quota is 0'])
  assert done.returncode == 1
  assert 'RESOURCE_EXHAUSTED: v6e quota is 0' in done.stderr


def test_a_dry_run_prints_what_would_run_and_calls_nothing(cloud):
  printed = []
  for arguments in (('create', 'demo', '--spot'), ('setup', 'demo'), RUN,
                    ('status', 'demo'), ('logs', 'demo'), ('stop', 'demo'),
                    ('delete', 'demo')):
    done = cloud(*arguments[:2], '--dry-run', *arguments[2:])
    assert done.returncode == 0 and not done.stderr
    printed += [shlex.split(x) for x in done.stdout.splitlines()]
  assert not (cloud.fake / 'calls').exists()
  assert all(p[:3] == ['gcloud', 'compute', 'tpus'] for p in printed)
  verbs = [' '.join(p[3:5]) for p in printed]
  assert verbs == [
      'queued-resources create', 'queued-resources describe', 'tpu-vm scp',
      'tpu-vm ssh', 'tpu-vm ssh', 'tpu-vm ssh', 'queued-resources describe',
      'tpu-vm ssh', 'tpu-vm ssh', 'tpu-vm ssh', 'queued-resources delete']
  assert 'cret' not in str(printed)
