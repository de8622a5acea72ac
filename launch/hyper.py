"""How a config's get_hyper(hyper) says what to try.

A trial is a dict from config fields to values; a sweep is a list of trials.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

Trial = dict[str, object]


def sweep(field: str, values: Iterable) -> list[Trial]:
  """One trial for each value of a field."""
  return [{field: value} for value in values]


def fixed(field: str, value) -> list[Trial]:
  """The same value in every trial."""
  return [{field: value}]


def product(*sweeps: Sequence[Trial]) -> list[Trial]:
  """Every combination of trials of the sweeps."""
  return [_merged(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Trial]) -> list[Trial]:
  """The first trials of all sweeps together, the second ones, and so on."""
  return [_merged(parts) for parts in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Trial]) -> list[Trial]:
  """One sweep after another."""
  return list(itertools.chain(*sweeps))


def subsample(trials: Sequence[Trial], count: int,
              seed: int = 0) -> list[Trial]:
  """`count` trials at random, in their order."""
  chosen = random.Random(seed).sample(range(len(trials)), count)
  return [trials[i] for i in sorted(chosen)]


def _merged(parts: Iterable[Trial]) -> Trial:
  merged: Trial = {}
  for part in parts:
    twice = set(merged) & set(part)
    if twice:
      raise ValueError(f'{sorted(twice)[0]} is set twice in one trial')
    merged |= part
  return merged
