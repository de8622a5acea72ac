"""The reward of a strategy, part by part (DESIGN.md, "Rewards").

    r = 0                                        if the strategy is malformed
    r = exec * success * (not leaks) + judge * quality - leak * leaks
        - degrade * max(0, base - success) - cost * relative cost

A new part is one line in `parts`. Lost episodes get no reward at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from exectune_jax.episode import LOST, MALFORMED, Episode, Reward


def score_group(episodes: Sequence[Episode], weights, kind: str,
                usd_per_guide_token: float) -> list[Episode]:
  """Fills in the rewards of one group.

  Args:
    episodes: all members; lost ones keep reward None.
    weights: config.reward.
    kind: 'exectune' or 'advisor' (success only, the baseline method).
    usd_per_guide_token: what a generated guide token costs.
  """
  known = [e for e in episodes if e.status != LOST]
  rate = sum(e.success for e in known) / max(1, len(known))
  scored = []
  for e in episodes:
    if e.status == LOST:
      reward = None
    elif kind == 'advisor':
      reward = Reward(float(e.success), {'exec': float(e.success)})
    elif e.status == MALFORMED:
      reward = Reward(0.0, {})
    else:
      named = parts(e, weights, rate, usd_per_guide_token)
      reward = Reward(sum(named.values()), named)
    scored.append(dataclasses.replace(e, reward=reward))
  return scored


def parts(e: Episode, weights, success_rate: float,
          usd_per_guide_token: float) -> dict[str, float]:
  """Weighted parts of the reward of a well-formed, executed strategy.

  Args:
    e: with verdict, leaks and base known.
    weights: config.reward.
    success_rate: of the group; it scales the cost, so that a group that
      fails is not taught to fail cheaply.
    usd_per_guide_token: what a generated guide token costs.
  """
  success = float(e.success)
  return {
      'exec': weights.exec * success * (not e.leaks),
      'judge': weights.judge * (e.judge or 0.0),
      'leak': -weights.leak * e.leaks,
      'degrade': -weights.degrade * max(0.0, e.base - success),
      'cost': -weights.cost * success_rate * relative_cost(
          e, usd_per_guide_token),
  }


def relative_cost(e: Episode, usd_per_guide_token: float) -> float:
  """Dollars of strategy and execution beyond core alone, in core-alones."""
  if not e.base_usd:
    return 0.0
  usd = e.execution.usd + len(e.strategy.tokens) * usd_per_guide_token
  return (usd - e.base_usd) / e.base_usd
