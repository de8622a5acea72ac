"""Stopped or killed at any instant, a run ends as if it had not been."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from exectune_jax import config as config_lib
from exectune_jax import interrupt
from exectune_jax.cores.ledger import Ledger
from exectune_jax.episode import Problem
from exectune_jax.errors import Stopped, UserError
from exectune_jax.learning.checkpoint import Checkpoints
from exectune_jax.learning.learner import Learner
from exectune_jax.rewards.collector import Collector
from exectune_jax.stages import collect, evaluate, rl, sft

ROOT = pathlib.Path(__file__).parents[1]
STEPS, GROUPS, SIZE = 5, 2, 3


def make_config():
  config = config_lib.runlocal(config_lib.default_config())
  config.compilation_cache = ''
  config.rl.update(steps=STEPS, groups=GROUPS, group_size=SIZE,
                   checkpoint_every=2, show_every=0, max_staleness=1)
  return config


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A workdir with collected strategies and the SFT guide."""
  workdir = tmp_path_factory.mktemp('prepared')
  config = make_config()
  collect.run(config, workdir)
  for stage in ('sft:base', 'sft'):
    sft.run(config_lib.variant(config, stage)[1], workdir)
  return workdir


def copy(prepared, folder):
  shutil.copytree(prepared, folder)
  return folder


def state_of(workdir):
  """Weights, episodes without latencies, metrics steps, ledger size."""
  config = make_config()
  learner = Learner(config, workdir, config.rl)
  weights = jax.device_get(learner.weights('exectune', 'test'))
  episodes = []
  for line in (workdir / 'episodes/exectune.jsonl').read_text().splitlines():
    row = json.loads(line)
    if row['execution']:
      row['execution'].pop('latency_s')
    episodes.append(row)
  steps = [json.loads(line)['step'] for line in
           (workdir / 'guides/exectune/metrics.jsonl').read_text().splitlines()]
  ledger = Ledger(workdir / 'ledger.sqlite')
  count, spent = ledger.count(), ledger.spent_usd
  ledger.close()
  return weights, episodes, steps, (count, round(spent, 12))


def same(a, b):
  for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
    np.testing.assert_array_equal(x, y)  # bitwise
  assert a[1] == b[1]
  assert a[2] == b[2] == list(range(1, STEPS + 1))
  assert a[3] == b[3]


@pytest.fixture(scope='module')
def uninterrupted(prepared, tmp_path_factory):
  workdir = copy(prepared, tmp_path_factory.mktemp('whole') / 'w')
  rl.run(make_config(), workdir)
  return state_of(workdir)


@pytest.mark.parametrize('stop_at', [1, 3])
def test_sigterm_then_the_same_command(prepared, uninterrupted, tmp_path,
                                       monkeypatch, stop_at):
  workdir = copy(prepared, tmp_path / 'w')
  plain, calls = Collector.take, []

  def take(self, *args):
    calls.append(args)
    if len(calls) == stop_at:
      interrupt._seen.append(signal.SIGTERM)
    return plain(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(Collector, 'take', take)
    with pytest.raises(Stopped):
      rl.run(make_config(), workdir)
  interrupt._seen.clear()
  rl.run(make_config(), workdir)
  same(state_of(workdir), uninterrupted)


def test_a_fatal_error_keeps_the_updates_done(prepared, uninterrupted,
                                              tmp_path, monkeypatch):
  workdir = copy(prepared, tmp_path / 'w')
  plain, calls = Collector.take, []

  def revoked(self, group):
    raise UserError('the key was revoked')

  def take(self, *args):
    calls.append(args)
    if len(calls) == 4:  # inside take: while a group is being finished
      patch.setattr(Collector, '_finish', revoked)
    return plain(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(Collector, 'take', take)
    with pytest.raises(UserError, match='revoked'):
      rl.run(make_config(), workdir)
  rl.run(make_config(), workdir)
  same(state_of(workdir), uninterrupted)


_RUN = """
import pathlib, sys
sys.path.insert(0, 'tests')
import time
from test_resume import make_config
from exectune_jax.rewards.collector import Collector
from exectune_jax.stages import rl
plain = Collector.take
def slow(*args):  # so that the parent can aim
  time.sleep(0.3)
  return plain(*args)
Collector.take = slow
rl.run(make_config(), pathlib.Path(sys.argv[1]))
"""


def test_kill_nine_then_the_same_command(prepared, uninterrupted, tmp_path):
  workdir = copy(prepared, tmp_path / 'w')
  child = subprocess.Popen(
      [sys.executable, '-c', _RUN, str(workdir)], cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, stderr=subprocess.DEVNULL)
  log = workdir / 'episodes/exectune.jsonl'
  while child.poll() is None:  # three steps done, a checkpoint after two
    if log.exists() and log.read_text().count('\n') >= 3 * GROUPS * SIZE:
      break
    time.sleep(0.02)
  child.kill()
  assert child.wait() == -signal.SIGKILL
  checkpoints = Checkpoints(workdir / 'guides/exectune')
  assert checkpoints.latest() in (2, 4)
  checkpoints.close()
  rl.run(make_config(), workdir)
  same(state_of(workdir), uninterrupted)


def test_stopped_fine_tuning_continues_bit_for_bit(prepared, tmp_path,
                                                   monkeypatch):
  workdir = copy(prepared, tmp_path / 'w')
  config = make_config()
  config.sft.update(steps=5, output='other')
  sft.run(config, workdir)
  plain = sft.batches.lay_out

  def lay_out(*args):
    interrupt._seen.append(signal.SIGINT)
    return plain(*args)

  config.sft.output = 'stopped'
  for _ in range(5):  # a signal in every single step
    with monkeypatch.context() as patch:
      patch.setattr(sft.batches, 'lay_out', lay_out)
      with pytest.raises(Stopped):
        sft.run(config, workdir)
    interrupt._seen.clear()
  sft.run(config, workdir)
  learner = Learner(config, workdir, config.sft)
  a, b = (jax.device_get(learner.weights(name, 'test'))
          for name in ('other', 'stopped'))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_finished_stages_do_nothing_again(prepared, tmp_path):
  workdir = copy(prepared, tmp_path / 'w')
  files = [workdir / 'collect/proposals.jsonl',
           workdir / 'guides/sft/metrics.jsonl',
           *(workdir / 'guides/sft').glob('2/params/*')]
  assert len(files) > 2
  before = [f.stat().st_mtime_ns for f in files]
  collect.run(make_config(), workdir)
  sft.run(make_config(), workdir)
  assert [f.stat().st_mtime_ns for f in files] == before


def test_interrupted_collect_pays_for_nothing_twice(tmp_path, monkeypatch):
  config = make_config()
  plain, calls = collect.collect_problem, []

  async def stop_soon(*args):
    calls.append(args)
    if len(calls) == 10:
      interrupt._seen.append(signal.SIGINT)
    return await plain(*args)

  config.core.name = 'toy:small?latency_s=0.02'
  config.core.concurrency = 2
  with monkeypatch.context() as patch:
    patch.setattr(collect, 'collect_problem', stop_soon)
    with pytest.raises(Stopped):
      collect.run(config, tmp_path)
  ledger = Ledger(tmp_path / 'ledger.sqlite')
  paid = ledger.count()
  ledger.close()
  interrupt._seen.clear()
  collect.run(config, tmp_path)
  rows = collect.read(tmp_path)
  whole = make_config()
  whole.core.name = 'toy:small?latency_s=0.02'
  other = tmp_path / 'other'
  other.mkdir()
  collect.run(whole, other)
  assert rows == collect.read(other)
  first, second = (Ledger(f / 'ledger.sqlite') for f in (tmp_path, other))
  assert 0 < paid < first.count() == second.count()
  assert first.spent_usd == pytest.approx(second.spent_usd)
  first.close()
  second.close()


def test_lost_rewards_stop_the_run_with_the_reason(prepared, tmp_path):
  workdir = copy(prepared, tmp_path / 'w')
  config = make_config()
  config.core.name = 'toy:small?failure_rate=1.0'
  config.core.attempts = 1
  with pytest.raises(UserError, match='rl.max_lost_fraction=0.5: 100% .*'
                     'injected failure'):
    rl.run(config, workdir)
  metrics = workdir / 'guides/exectune/metrics.jsonl'
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  assert rows
  for row in rows:
    assert row['lost'] == 1.0 and 'reward' not in row  # unknown is not 0


def test_checkpoint_of_another_model_is_named(prepared, tmp_path):
  workdir = copy(prepared, tmp_path / 'w')
  path = workdir / 'guides/sft/guide.json'
  held = json.loads(path.read_text())
  path.write_text(json.dumps({**held, 'layers': 7}))
  with pytest.raises(UserError, match='another model: layers=7'):
    rl.run(make_config(), workdir)


def test_a_guide_that_was_not_trained_is_named(prepared, tmp_path):
  workdir = copy(prepared, tmp_path / 'w')
  config = make_config()
  config.rl.init = 'advisor'
  with pytest.raises(UserError, match="rl.init='advisor': there is no"):
    rl.run(config, workdir)
  with pytest.raises(UserError, match="evaluate.systems='advisor'"):
    evaluate.run(config, workdir)


def test_a_transfer_task_of_the_same_kind_is_kept_apart(tmp_path):
  config = make_config()
  for name, count in (('mine', 3), ('other', 2)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'test.jsonl').write_text(''.join(
        json.dumps({'question': f'{name}: {i} + 1?', 'answer': i + 1}) + '\n'
        for i in range(count)))
  config.task.update(name='jsonl', data_dir=str(tmp_path / 'mine'))
  config.evaluate.update(systems=('core_alone',), transfer='jsonl',
                         transfer_data_dir=str(tmp_path / 'other'))
  evaluate.run(config, tmp_path)
  for folder, name, count in (('evaluate', 'mine', 3),
                              ('evaluate/transfer', 'other', 2)):
    path = tmp_path / folder / 'jsonl_core_alone_greedy.jsonl'
    rows = [json.loads(x) for x in path.read_text().splitlines()[1:]]
    assert [r['problem']['question'] for r in rows] == [
        f'{name}: {i} + 1?' for i in range(count)]


def test_other_truncation_draws_other_strategies(prepared, tmp_path):
  """Top 1 makes every draw the greedy one, whatever was drawn before."""
  workdir, config = copy(prepared, tmp_path / 'w'), make_config()
  config.evaluate.update(systems=('core_alone', 'sft'), alpha_samples=2)
  def drawn(kind):
    path = workdir / f'evaluate/word_problems_sft_{kind}.jsonl'
    rows = [json.loads(x) for x in path.read_text().splitlines()[1:]]
    return [r['strategy']['text'] for r in rows]
  evaluate.run(config, workdir)
  greedy = [text for text in drawn('greedy') for _ in range(2)]
  assert drawn('sampled') != greedy
  config.evaluate.top_k = 1
  evaluate.run(config, workdir)
  assert drawn('sampled') == greedy


def test_a_prompt_that_is_cut_is_told_once(tmp_path, capsys):
  config = make_config()
  config.guide.max_prompt_tokens = 16
  guide = Learner(config, tmp_path, config.rl).guide
  problem = Problem('p', 'How many apples? ' * 20, '1')
  for _ in range(2):
    assert guide.prompt(problem) == guide.whole_prompt(problem)[-16:]
  assert capsys.readouterr().err.count('guide.max_prompt_tokens=16') == 1
