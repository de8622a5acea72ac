"""The RL stage as a whole: what it trains on, waits for, and reports."""

import json
import signal

import numpy as np
import pytest
from test_resume import copy, make_config, prepared, same, state_of

from exectune_jax import interrupt
from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import Stopped
from exectune_jax.rewards.collector import Collector
from exectune_jax.stages import rl

__all__ = ['prepared']  # a fixture


def logged(workdir):
  """Episodes by group, and metrics by step."""
  groups, path = {}, workdir / 'episodes/exectune.jsonl'
  for row in map(json.loads, path.read_text().splitlines()):
    groups.setdefault((row['step'], row['group']), []).append(row)
  metrics = [json.loads(line) for line in (
      workdir / 'guides/exectune/metrics.jsonl').read_text().splitlines()]
  return groups, metrics


def equal_rewards(rows):
  rewards = [row['reward']['total'] for row in rows if row['reward']]
  return len(rewards) > 1 and np.ptp(rewards) == 0


@pytest.fixture
def replacing():
  config = make_config()
  config.rl.update(replace=2, groups=4, group_size=2, steps=5)
  config.reward.cost = 0.0  # else no two rewards are the same
  return config


@pytest.mark.parametrize('deterministic', [True, False])
def test_groups_of_equal_rewards_are_replaced(prepared, tmp_path, replacing,
                                              deterministic):
  workdir, places = copy(prepared, tmp_path / 'w'), 5 * 4
  replacing.rl.deterministic = deterministic
  rl.run(replacing, workdir)
  groups, metrics = logged(workdir)
  replaced, trained = 0, []
  for step, number in groups:
    successor = number + places
    times = number // places
    if any(n == successor for _, n in groups):
      assert equal_rewards(groups[step, number])
      assert times < 2
      replaced += 1
      assert (groups[step, number][0]['problem']['id']
              != next(rows for (_, n), rows in groups.items()
                      if n == successor)[0]['problem']['id'])
    else:
      trained.append(step)
      assert times == 2 or not equal_rewards(groups[step, number])
  # every place is trained once, four a step, however often it was replaced
  assert sorted(trained) == [s for s in range(1, 6) for _ in range(4)]
  assert sorted(n % places for s, n in groups
                if not any(m == n + places for _, m in groups)) == list(
                    range(places))
  assert sum(m['replaced'] for m in metrics) * 4 == pytest.approx(replaced)
  assert replaced > 3
  for m in metrics:
    assert m['staleness_0'] + m['staleness_1'] == pytest.approx(1.0)
    assert m['staleness'] == pytest.approx(m['staleness_1'])


def test_a_stop_while_groups_are_replaced(prepared, tmp_path, replacing,
                                          monkeypatch):
  """The stopped run goes on with the very groups that were in flight."""
  whole, stopped = (copy(prepared, tmp_path / name) for name in 'ab')
  rl.run(replacing, whole)
  plain, calls = Collector.take, []

  def take(self, *args):
    calls.append(args)
    if len(calls) in (2, 4):  # of one step: the second waits for new groups
      interrupt._seen.append(signal.SIGTERM)
    return plain(self, *args)

  monkeypatch.setattr(Collector, 'take', take)
  stops = 0
  for _ in range(3):
    try:
      rl.run(replacing, stopped)
    except Stopped:
      stops += 1
      interrupt._seen.clear()
  assert stops == 2
  monkeypatch.undo()
  assert json.dumps(sorted(logged(whole)[0])) == json.dumps(
      sorted(logged(stopped)[0]))
  same(state_of(whole), state_of(stopped))


def test_metrics_say_where_time_and_money_go(prepared, tmp_path):
  workdir = copy(prepared, tmp_path / 'w')
  config = make_config()
  config.core.name = 'toy:small?latency_s=2'
  config.rl.update(max_staleness=0, steps=3)
  rl.run(config, workdir)
  groups, metrics = logged(workdir)
  for m in metrics:  # the core, asked before sampling, takes two seconds
    assert m['seconds_sampling'] + m['seconds_waiting'] > 1.9
    assert 0 < m['seconds_waiting'] < m['seconds_step']
    assert m['idle'] == pytest.approx(m['seconds_waiting']
                                      / m['seconds_step'])
    # one update a batch of the newest guide: all weights are 1
    assert m['effective_samples'] == pytest.approx(1.0, abs=1e-3)
  ledger = Ledger(workdir / 'ledger.sqlite')
  (own,) = ledger.rows("SELECT SUM(usd) AS usd FROM calls "
                       "WHERE stage = 'rl:exectune'")
  assert sum(m['usd_step'] for m in metrics) == pytest.approx(own['usd'])
  assert metrics[-1]['usd_total'] == pytest.approx(ledger.spent_usd)
  ledger.close()
  assert sorted({step for step, _ in groups}) == [1, 2, 3]


def test_effective_samples_of_unequal_weights():
  """(sum w)^2 / (n sum w^2) of w = 1, 1, 2, 0: 16 / (4 * 6)."""
  class Writer:
    def write(self, step, values):
      self.values = values
  writer = Writer()
  values = {'tis_weight': np.mean([1, 1, 2, 0]),
            'tis_weight_sq': np.mean([1, 1, 4, 0])}
  rl._report((1, values, {'reward': 0.0, 'success': 0.0}), writer)
  assert writer.values['effective_samples'] == pytest.approx(16 / 24)


