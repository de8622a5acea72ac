"""Intervals and tests for paired comparisons of systems."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
  """Score interval of a proportion (Wilson, 1927)."""
  if n == 0:
    return 0.0, 1.0
  p = successes / n
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = (z / (1 + z * z / n)) * math.sqrt(
      p * (1 - p) / n + z * z / (4 * n * n))
  # At the edges the interval touches 0 and 1; rounding must not miss them.
  return (0.0 if successes == 0 else centre - half,
          1.0 if successes == n else centre + half)


def paired_difference(a: Sequence[bool], b: Sequence[bool], z: float = Z95
                      ) -> tuple[float, tuple[float, float]]:
  """Accuracy of a minus that of b on the same problems, with interval.

  The interval is Wald's for paired proportions: with discordant shares
  p10 and p01, variance (p10 + p01 - (p10 - p01)^2) / n.
  """
  n = len(a)
  if n == 0:
    return 0.0, (-1.0, 1.0)
  p10 = sum(x and not y for x, y in zip(a, b, strict=True)) / n
  p01 = sum(y and not x for x, y in zip(a, b, strict=True)) / n
  difference = p10 - p01
  half = z * math.sqrt(max(0.0, p10 + p01 - difference ** 2) / n)
  return difference, (difference - half, difference + half)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
  """Exact two-sided McNemar p: binomial test on the discordant pairs."""
  only_a = sum(x and not y for x, y in zip(a, b, strict=True))
  only_b = sum(y and not x for x, y in zip(a, b, strict=True))
  n, k = only_a + only_b, min(only_a, only_b)
  if n == 0:
    return 1.0
  tail = sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n
  return min(1.0, 2 * tail)


def pass_at_k(n: int, c: int, k: int) -> float:
  """Unbiased pass@k from c successes in n draws (Chen et al., 2021)."""
  if not 0 <= c <= n or not 1 <= k <= n:
    raise ValueError(f'pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, '
                     f'c={c}, k={k}')
  return 1.0 - math.comb(n - c, k) / math.comb(n, k)
