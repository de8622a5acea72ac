"""Intervals and tests for paired comparisons of systems."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
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


def clustered(rates: Sequence[float], draws: int, z: float = Z95
              ) -> tuple[float, float]:
  """Interval of a mean of rates, several draws of one problem being a rate.

  Wilson's, for as many draws as would make the variance between problems if
  they were independent (Kish's design effect), but no more than there are;
  one draw a problem is `wilson`.
  """
  n = len(rates)
  if n == 0:
    return 0.0, 1.0
  p = sum(rates) / n
  variance = sum((r - p) ** 2 for r in rates) / n ** 2
  effective = min(p * (1 - p) / variance, draws) if variance > 0 else n
  return wilson(p * effective, effective, z)


def paired_difference(a: Sequence[bool], b: Sequence[bool], z: float = Z95
                      ) -> tuple[float, tuple[float, float]]:
  """Accuracy of a minus that of b on the same problems, with interval.

  The interval is that of Agresti and Min (2005): Wald's for paired
  proportions, with half a problem added to each of the four outcomes. Where
  systems never differ it has a width all the same.
  """
  n = len(a)
  if n == 0:
    return 0.0, (-1.0, 1.0)
  only_a = sum(x and not y for x, y in zip(a, b, strict=True))
  only_b = sum(y and not x for x, y in zip(a, b, strict=True))
  p10, p01 = (only_a + 0.5) / (n + 2), (only_b + 0.5) / (n + 2)
  centre = p10 - p01
  half = z * math.sqrt((p10 + p01 - centre ** 2) / (n + 2))
  return (only_a - only_b) / n, (max(-1.0, centre - half),
                                 min(1.0, centre + half))


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
