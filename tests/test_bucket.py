"""Workdirs in a bucket, for which a local directory stands: lost disks, kills,
segments that are shipped twice, buckets that fail."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from fake_gcs import FakeGcs

from exectune_jax import bucket
from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores.segments import Segments
from exectune_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def pay(ledger, *keys, usd=0.25):
  for key in keys:
    ledger.begin(key, 'core', 'collect', usd)
    ledger.put(key, 'core', 'collect', CoreRequest((('user', key),), 0.0, 9),
               CoreReply(f'to {key}', 'stop', 10, 2, usd, 0.1))


def fail(ledger, key, usd):
  ledger.begin(key, 'core', 'collect', 1.0)
  ledger.fail(key, 'core', 'collect', f'reason {key}', usd)


def content(ledger):
  rows = ledger.rows('SELECT * FROM calls ORDER BY key')
  failed = ledger.rows('SELECT * FROM failed ORDER BY reason')
  return [tuple(r) for r in (*rows, *failed)], round(ledger.spent_usd, 9)


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path / 'bucket/ledger')


def test_a_fresh_disk_gets_every_row_and_every_dollar(tmp_path, folder):
  segments = Segments(tmp_path / 'a.sqlite', folder)
  assert segments.ship() == 0 and not folder.exists()  # no empty segments
  pay(segments.ledger, 'k1', 'k2')
  assert segments.ship() == 2
  pay(segments.ledger, 'k3')
  fail(segments.ledger, 'x', 0.5)
  fail(segments.ledger, 'y', None)
  assert segments.ship() == 3 and segments.ship() == 0
  assert len(list(folder.iterdir())) == 2
  fresh = Segments(tmp_path / 'b.sqlite', folder)
  assert fresh.restore() == 5 and fresh.restore() == 0
  assert content(fresh.ledger) == content(segments.ledger)
  assert fresh.ledger.spent_usd == 1.25
  assert fresh.ledger.get('k3').text == 'to k3'
  assert fresh.ship() == 0  # what came from there does not go back
  pay(fresh.ledger, 'k4')
  assert fresh.ship() == 1
  assert segments.restore() == 1  # the first machine again, later
  assert content(fresh.ledger) == content(segments.ledger)
  segments.close()
  fresh.close()


def test_a_crash_between_upload_and_noting_it_counts_nothing_twice(
    tmp_path, folder, monkeypatch):
  segments = Segments(tmp_path / 'a.sqlite', folder)
  pay(segments.ledger, 'k1', 'k2')
  fail(segments.ledger, 'x', 0.5)
  with monkeypatch.context() as patch:
    patch.setattr(Ledger, 'transaction', lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      segments.ship()
  segments.close()
  again = Segments(tmp_path / 'a.sqlite', folder)
  assert again.ship() == 3 and len(list(folder.iterdir())) == 2
  fresh = Segments(tmp_path / 'b.sqlite', folder)
  assert fresh.restore() == 3
  assert content(fresh.ledger) == content(again.ledger)
  assert fresh.ledger.spent_usd == 1.0
  again.close()
  fresh.close()


def test_rows_from_before_there_was_a_bucket_are_shipped(tmp_path, folder):
  ledger = Ledger(tmp_path / 'a.sqlite')
  pay(ledger, *(f'k{i}' for i in range(4500)), usd=0.0)
  ledger.close()
  segments = Segments(tmp_path / 'a.sqlite', folder)
  assert segments.ship() == 4500
  assert len(list(folder.iterdir())) == 3
  segments.close()


def test_half_a_segment_is_none(tmp_path, folder):
  folder.mkdir(parents=True)
  (folder / '000000000001.7.aa.jsonl.partial').write_text('["calls", {"ke')
  segments = Segments(tmp_path / 'a.sqlite', folder)
  assert segments.restore() == 0
  segments.close()


def test_runs_that_share_a_ledger_pay_once_and_know_what_was_saved(
    tmp_path, folder):
  one = Segments(tmp_path / 'a.sqlite', folder / 'one.host0', shared=True)
  two = Segments(tmp_path / 'b.sqlite', folder / 'two.host0', shared=True)
  pay(one.ledger, 'k1', 'k2')
  one.ship()
  assert two.restore() == 2
  two.ledger.reuse('k1', 'two')  # its stage is not of the run 'two'
  pay(two.ledger, 'k3')
  assert two.ship() == 2
  every = Segments(tmp_path / 'c.sqlite', folder / 'none', shared=True)
  assert every.restore() == 4
  assert every.ledger.spent_usd == 0.75
  assert [tuple(r) for r in every.ledger.rows('SELECT * FROM reused')] == [
      ('two', 'k1', 0.25)]
  for segments in (one, two, every):
    segments.close()


def test_a_call_that_two_machines_paid_for_is_on_the_bill_twice(tmp_path,
                                                               folder):
  one = Segments(tmp_path / 'a.sqlite', folder / 'one', shared=True)
  two = Segments(tmp_path / 'b.sqlite', folder / 'two', shared=True)
  pay(one.ledger, 'k1')
  pay(two.ledger, 'k1', 'k2')
  one.ship()
  two.ship()
  for segments in (one, two):
    segments.restore()
    assert segments.ledger.count() == 2
    assert segments.ledger.spent_usd == 0.75
    assert segments.restore() == 0
    segments.close()


def test_an_emptied_bucket_gets_everything_again(tmp_path, folder):
  segments = Segments(tmp_path / 'a.sqlite', folder)
  pay(segments.ledger, 'k1', 'k2')
  segments.ship()
  shutil.rmtree(folder)
  assert segments.restore() == 0 and segments.ship() == 2
  segments.close()
  moved = Segments(tmp_path / 'a.sqlite', folder.parent / 'elsewhere')
  moved.restore()
  assert moved.ship() == 0  # noted under the other name only
  moved.close()


@pytest.fixture
def disk(tmp_path, monkeypatch):
  """disk(name): what follows runs on that machine."""
  def use(name):
    bucket.detach()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / name))
    return bucket.attach(f'file://{tmp_path}/bucket', 0)
  yield use
  bucket.detach()


def test_files_travel_whole_and_only_when_they_change(disk, tmp_path,
                                                      monkeypatch):
  monkeypatch.setattr(bucket, 'SHIP_S', 1000)
  remote, local = tmp_path / 'bucket', disk('one')
  (local / 'guides/sft').mkdir(parents=True)
  (local / 'guides/sft/metrics.jsonl').write_text('{"step": 1}\n')
  (local / 'x.partial').write_text('half')
  bucket.flush()
  shipped = remote / 'guides/sft/metrics.jsonl'
  assert shipped.read_text() == '{"step": 1}\n'
  assert not (remote / 'x.partial').exists()
  assert not list(remote.rglob('*.sqlite*'))
  before = shipped.stat().st_mtime_ns
  bucket.flush()
  assert shipped.stat().st_mtime_ns == before
  with (local / 'guides/sft/metrics.jsonl').open('a') as log:
    log.write('{"step": 2}\n')
    log.flush()
    bucket.flush()
    bucket.refresh()  # leaves our own open files alone
    log.write('{"step": 3}\n')
  bucket.flush()
  assert shipped.read_text().count('\n') == 3
  # a checkpoint there is neither fetched nor touched
  (remote / 'guides/sft/12').mkdir()
  (remote / 'guides/sft/12/weights').write_text('w')
  other = disk('two')
  assert (other / 'guides/sft/metrics.jsonl').read_text().count('\n') == 3
  assert not (other / 'guides/sft/12').exists()
  (other / 'guides/sft/metrics.jsonl').write_text('{"step": 9}\n')
  assert disk('one') == local  # the first machine takes over again
  assert (local / 'guides/sft/metrics.jsonl').read_text() == '{"step": 9}\n'
  assert bucket.place(local / 'guides/sft') == epath.Path(
      remote / 'guides/sft')


def test_trouble_is_told_once_and_over_when_it_is_over(disk, tmp_path, capfd,
                                                       monkeypatch):
  monkeypatch.setattr(bucket, 'SHIP_S', 0.05)
  local = disk('one')
  remote = tmp_path / 'bucket'
  for item in remote.iterdir():
    shutil.rmtree(item)
  remote.rmdir()
  remote.write_text('no directory any more')
  (local / 'config.json').write_text('{}')
  error = ''
  while not error.endswith('trying again\n'):
    error += capfd.readouterr().err
  time.sleep(0.5)
  assert not capfd.readouterr().err
  with pytest.raises(UserError, match='cannot be written.*what it lacks is in'):
    bucket.flush()
  remote.unlink()
  while not (remote / 'config.json').exists():
    time.sleep(0.02)


def test_who_empties_the_bucket_begins_anew(disk, tmp_path, capfd):
  local = disk('one')
  (local / 'config.json').write_text('{}')
  bucket.flush()
  bucket.detach()
  shutil.rmtree(tmp_path / 'bucket')
  assert disk('one') == local and not (local / 'config.json').exists()
  assert 'beginning anew' in capfd.readouterr().err
  (aside,) = local.parent.glob('host0.*')
  assert (aside / 'config.json').exists()


def test_a_real_client_of_google_cloud_storage(tmp_path, monkeypatch):
  """gcsfs: no folders, no empty ones, and listings that it would keep."""
  gcsfs = pytest.importorskip('gcsfs')
  with FakeGcs() as gcs:
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', gcs.url)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    gcsfs.GCSFileSystem.clear_instance_cache()
    local = bucket.attach('gs://b/a/run', 0)
    ledger = Ledger(local / 'ledger.sqlite')
    pay(ledger, 'k1')
    ledger.close()
    (local / 'guides/sft').mkdir(parents=True)
    (local / 'guides/sft/metrics.jsonl').write_text('{"step": 1}\n')
    bucket.flush()
    names = sorted(gcs.objects)
    assert names[0] == 'a/run/guides/sft/metrics.jsonl'
    assert len(names) == 2 and names[1].startswith('a/run/ledger/host0/')
    # another host writes, and checkpoints are there
    gcs.put('a/run/report.json', b'{"n": 1}')
    gcs.put('a/run/guides/sft/7/params/x', b'w')
    bucket.refresh()
    assert (local / 'report.json').read_text() == '{"n": 1}'
    assert not (local / 'guides/sft/7').exists()
    before = gcs.generation
    bucket.flush()
    assert gcs.generation == before  # nothing has changed
    bucket.detach()
    fresh = bucket.attach('gs://b/a/run', 1)  # another disk
    assert (fresh / 'guides/sft/metrics.jsonl').read_text() == '{"step": 1}\n'
    bucket.detach()


@pytest.mark.parametrize('url', ['nothing://x', 'file:///proc/x'])
def test_what_is_no_bucket_is_one_line(url, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  with pytest.raises(UserError, match=r'--workdir=.*\[gcs\]'):
    bucket.attach(url, 0)


def command(workdir, **fields):
  fields = {'stages': 'collect,sft:base,rl', 'rl.init': 'base', 'rl.steps': 8,
            'rl.checkpoint_every': 2, 'rl.show_every': 0,
            'core.name': 'toy:small?latency_s=0.2', **fields}
  return [sys.executable, '-m', 'exectune_jax.main',
          '--config=configs/quickstart.py:runlocal', f'--workdir={workdir}',
          *(f'--config.{k}={v}' for k, v in fields.items())]


def weights(folder):
  """Parameters of the newest checkpoint, as bytes."""
  import jax
  import orbax.checkpoint as ocp
  (step,) = [p for p in folder.iterdir() if p.name.isdigit()]
  held = ocp.StandardCheckpointer().restore(step.resolve() / 'params')
  return step.name, [(jax.tree_util.keystr(k), v.tobytes())
                     for k, v in jax.tree_util.tree_leaves_with_path(held)]


def asked(path):
  ledger = Ledger(path)
  try:
    return {r['key'] for r in ledger.rows('SELECT key FROM calls')}
  finally:
    ledger.close()


def test_a_lost_machine_costs_seconds_of_calls(tmp_path):
  """Killed in the middle of RL, its disk gone; the same command elsewhere
  ends with bitwise the same guide and pays for few calls again."""
  plain, remote = tmp_path / 'plain', tmp_path / 'bucket'
  subprocess.run(command(plain), cwd=ROOT, check=True,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  url = f'file://{remote}'

  def machine(name):
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu',
           'XDG_CACHE_HOME': str(tmp_path / name)}
    return subprocess.Popen(command(url), cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)
  first = machine('disk1')
  metrics = remote / 'guides/exectune/metrics.jsonl'
  while not (metrics.exists() and metrics.read_text().count('\n') >= 3):
    assert first.poll() is None, first.communicate()
    time.sleep(0.01)
  first.send_signal(signal.SIGKILL)
  assert first.wait() == -signal.SIGKILL  # and not done before
  (lost,) = (tmp_path / 'disk1').rglob('ledger.sqlite')
  paid = asked(lost)
  shutil.rmtree(tmp_path / 'disk1')
  second = machine('disk2')
  out, error = second.communicate(timeout=200)
  assert second.returncode == 0, error[-2000:]
  assert 'base: done before' in out  # resumed, not begun again
  assert weights(remote / 'guides/exectune') == weights(
      plain / 'guides/exectune')
  rows = [[json.loads(x) for x in (w / 'guides/exectune/metrics.jsonl'
                                   ).read_text().splitlines()]
          for w in (plain, remote)]
  assert [r['step'] for r in rows[1]] == list(range(1, 9))
  assert [r['reward'] for r in rows[0]] == [r['reward'] for r in rows[1]]
  (path,) = (tmp_path / 'disk2').rglob('ledger.sqlite')
  assert asked(path) == asked(plain / 'ledger.sqlite')
  restored = Segments(tmp_path / 'count.sqlite', epath.Path(
      remote / 'ledger/host0'))
  restored.restore()  # a third machine would begin with all of it
  assert asked(tmp_path / 'count.sqlite') == asked(path)
  restored.close()
  assert len(paid) >= 30
