"""From the rewards of a group to advantages (numpy, on the host)."""

from __future__ import annotations

import numpy as np

STD_FLOOR = 1e-3


def group_advantages(rewards_G, mode: str = 'centre',
                     baseline: str = 'group', base: float = 0.0):
  """Advantages of one group.

  Two traps. Within a group the core-alone success is constant, so with
  binary success, dividing by the standard deviation cancels the degradation
  penalty exactly: centring is the default. And with division, a solved group
  whose members differ by a cent gets full-size advantages: hence the floor.

  Args:
    rewards_G: NaN marks a lost member, which leaves mean and deviation.
    mode: 'centre' (r - mean) or 'std' ((r - mean) / max(std, floor), with
      the unbiased standard deviation).
    baseline: 'group', or 'core_alone' (A = r - base; a group in which every
      strategy breaks a right core then still teaches).
    base: success of the core alone, for baseline 'core_alone'.

  Returns:
    advantages_G (0 where lost) and valid_G. With fewer than two valid
    members nobody is valid: there is nothing to compare.
  """
  rewards = np.asarray(rewards_G, np.float64)
  valid = np.isfinite(rewards)
  if valid.sum() < 2:
    return np.zeros_like(rewards), np.zeros_like(valid)
  centre = base if baseline == 'core_alone' else rewards[valid].mean()
  advantages = np.where(valid, rewards - centre, 0.0)
  if mode == 'std':
    advantages /= max(rewards[valid].std(ddof=1), STD_FLOOR)
  # Equal rewards must give exactly zero, not the mean's rounding error.
  if baseline == 'group' and np.ptp(rewards[valid]) == 0:
    advantages[:] = 0.0
  return advantages, valid
