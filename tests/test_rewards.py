import json

import numpy as np
import pytest

from exectune_jax.episode import (LOST, MALFORMED, Episode, Execution, Problem,
                                  Strategy, Verdict)
from exectune_jax.learning.advantages import group_advantages
from exectune_jax.rewards.executability import score_group

WEIGHTS = {'exec': 1.0, 'judge': 0.5, 'leak': 1.0, 'degrade': 0.5, 'cost': 0.1}


def episode(success=True, leaks=False, base=0.0, status='ok', usd=2e-6,
            tokens=10, quality=None):
  return Episode(
      Problem('p', 'q', '7'), status=status, leaks=leaks, base=base,
      base_usd=1e-6, judge=quality,
      strategy=Strategy('t', 'b', tokens=(1,) * tokens),
      execution=Execution('x', 'stop', 1, 1, usd, 0.0),
      verdict=Verdict(success))


def totals(*episodes, kind='exectune', weights=None, guide_price=0.0):
  import ml_collections
  weights = ml_collections.ConfigDict(weights or {**WEIGHTS, 'cost': 0.0})
  return [None if e.reward is None else e.reward.total
          for e in score_group(episodes, weights, kind, guide_price)]


@pytest.mark.parametrize('e, expected', [
    (episode(), 1.0),
    (episode(success=False), 0.0),
    (episode(leaks=True), -1.0),  # no credit, and the penalty
    (episode(success=False, leaks=True), -1.0),
    (episode(base=1.0), 1.0),
    (episode(success=False, base=1.0), -0.5),
    (episode(success=False, base=0.5), -0.25),
    (episode(quality=0.8), 1.4),
    (episode(status=MALFORMED, base=1.0), 0.0),
    (episode(status=LOST), None),
])
def test_reward_table(e, expected):
  assert totals(e) == [expected]


def test_parts_sum_to_the_total():
  (scored,) = score_group([episode(success=False, leaks=True, base=1.0,
                                   quality=0.5)],
                          __import__('ml_collections').ConfigDict(WEIGHTS),
                          'exectune', 1e-9)
  assert scored.reward.total == pytest.approx(sum(
      scored.reward.parts.values()))
  assert set(scored.reward.parts) == set(WEIGHTS)


def test_cost_by_hand():
  # Two of four succeed, so the rate is 1/2. Relative costs: (2e-6 + 10 * 1e-7
  # - 1e-6) / 1e-6 = 2 and (4e-6 + 1e-6 - 1e-6) / 1e-6 = 4.
  group = [episode(), episode(usd=4e-6), episode(success=False),
           episode(success=False), episode(status=LOST)]
  found = totals(*group, weights=WEIGHTS, guide_price=1e-7)
  assert found[:4] == pytest.approx([1 - 0.1 * 0.5 * 2, 1 - 0.1 * 0.5 * 4,
                                     -0.1, -0.1])
  assert found[4] is None


def test_a_failing_group_is_not_taught_to_fail_cheaply():
  group = [episode(success=False, usd=u) for u in (1e-6, 9e-6)]
  assert totals(*group, weights=WEIGHTS) == [0.0, 0.0]


def test_advisor_reward_is_success_only():
  group = [episode(leaks=True, base=1.0), episode(success=False, base=1.0),
           episode(status=LOST)]
  assert totals(*group, kind='advisor') == [1.0, 0.0, None]


def test_advantages_match_golden_numbers(shared):
  golden = json.loads((shared / 'golden/grpo_golden.json').read_text())
  adv = golden['adv']
  centred, valid = group_advantages(adv['R'])
  np.testing.assert_allclose(centred, adv['centred'], atol=1e-12)
  assert valid.all()
  # golden divides by (std + 1e-6), we by max(std, 1e-3): equal to 3e-6
  std, _ = group_advantages(adv['R'], 'std')
  np.testing.assert_allclose(std, adv['std_ddof1_eps1e-6'], rtol=3e-6)
  lost, valid = group_advantages([1, 0, np.nan, 1], 'std')
  np.testing.assert_allclose(lost, golden['adv_nan']['valid_only'], rtol=3e-6,
                             atol=1e-12)
  assert valid.tolist() == [True, True, False, True]


def test_advantages_by_hand():
  centred, _ = group_advantages([1.0, 0.0, 0.5, 1.0])
  np.testing.assert_allclose(centred, [0.375, -0.625, -0.125, 0.375])
  alone, _ = group_advantages([1.0, -0.5], baseline='core_alone', base=1.0)
  np.testing.assert_allclose(alone, [0.0, -1.5])
  # every strategy breaks a right core: no signal centred, signal with base
  assert not group_advantages([-0.5] * 4)[0].any()
  assert (group_advantages([-0.5] * 4, baseline='core_alone',
                           base=1.0)[0] == -1.5).all()


def test_std_division_would_cancel_the_degradation_penalty():
  right_base, wrong_base = [1, 1, -0.5, -0.5], [1, 1, 0, 0]
  a, b = (group_advantages(r, 'std')[0] for r in (right_base, wrong_base))
  np.testing.assert_allclose(a, b)
  a, b = (group_advantages(r)[0] for r in (right_base, wrong_base))
  np.testing.assert_allclose(a, [0.75, 0.75, -0.75, -0.75])
  np.testing.assert_allclose(b, [0.5, 0.5, -0.5, -0.5])


@pytest.mark.parametrize('mode', ['centre', 'std'])
def test_equal_rewards_are_exactly_zero(mode):
  for value in (0.7000000476837158, 0.1, 1 / 3, 0.0):
    for size in (2, 3, 7, 8):
      assert not group_advantages([value] * size, mode)[0].any()


def test_pennies_are_floored_not_blown_up():
  advantages, _ = group_advantages([1.0, 1.0 - 1e-4], 'std')
  assert abs(advantages).max() == pytest.approx(5e-5 / 1e-3)


def test_too_few_valid_members_leave_the_batch():
  for rewards in ([1.0, np.nan, np.nan], [np.nan] * 3):
    advantages, valid = group_advantages(rewards)
    assert not advantages.any() and not valid.any()
