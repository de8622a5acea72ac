"""A running grid of samples: prompts come in at any time, samples go out.

Shapes: B slots for prompts, G samples of a prompt, T new tokens.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from exectune_jax.learning import sharding
from exectune_jax.learning.batches import bucket


@dataclasses.dataclass(frozen=True)
class Sample:
  """One finished sample.

  row, index: which prompt, and which of its G samples.
  logprobs: under softmax(logits / temperature); at temperature 0 under
    softmax(logits).
  complete: False if it ran out of tokens before the end token or a stop.
  """
  row: int
  index: int
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  complete: bool


@dataclasses.dataclass(frozen=True)
class _Waiting:
  """A prompt without a slot. width: its length with padding."""
  row: int
  prompt: Sequence[int]
  group: int
  width: int


class Grid:
  """The host's side of a grid; `Sampler` has the compiled one.

  Args:
    sampler: whose programs run.
    variables: as `Sampler.prepare` gives them.
    slots: B, a multiple of the devices that share rows.
    group_size: G.
    width: of the longest prompt that may come, with padding.
    seed: base seed.
    how: temperature, top_k, top_p.
  """

  def __init__(self, sampler, variables, slots: int, group_size: int,
               width: int, seed: int, **how):
    self.sampler, self.variables, self.how = sampler, variables, how
    self.slots = slots
    self._seed = sharding.put(np.uint32(seed),
                              sharding.replicated(sampler.mesh))
    self._rows = sharding.rows(sampler.mesh)
    self._state = sampler.empty(slots, group_size, width)
    self._queue: collections.deque[_Waiting] = collections.deque()
    self._held = np.full(slots, -1)  # which row is in a slot
    self._handed = np.ones((slots, group_size), bool)
    self._stopped = np.zeros((slots, group_size), bool)

  def add(self, row: int, prompt: Sequence[int], group: int,
          width: int = 0) -> None:
    """Queues a prompt.

    Args:
      row: its number in the samples that come out, 0 or more.
      prompt: token ids.
      group: seeds its samples.
      width: with padding; 0 for the next one that is compiled.
    """
    self._queue.append(_Waiting(row, prompt, group,
                                width or padded(len(prompt))))

  def drop(self, row: int) -> None:
    """Forgets a prompt: no more samples of it come out."""
    self._queue = collections.deque(w for w in self._queue if w.row != row)
    held = self._held == row
    self._handed[held] = self._stopped[held] = True
    self._held[held] = -1

  @property
  def busy(self) -> bool:
    """Whether any prompt waits or is in a slot."""
    return bool(self._queue) or bool((self._held >= 0).any())

  def step(self) -> list[Sample]:
    """Fills free slots, decodes a chunk; returns what has ended in it."""
    s = self.sampler
    while self._queue and (self._held < 0).any():
      self._fill()
    self._state = s.chunk(self.variables, self._state, sharding.put(
        self._stopped, self._rows), **self.how)
    # A new array: the device may still read the old one.
    self._stopped = np.zeros_like(self._stopped)
    view = jax.device_get(s.view({k: self._state[k] for k in (
        'age_B', 'length_BG', 'tokens_BGT', 'logp_BGT')}))
    found = []
    for slot, index in zip(*np.nonzero(~self._handed), strict=True):
      n, complete = self._ended(view, slot, index)
      if n:
        self._handed[slot, index] = self._stopped[slot, index] = True
        found.append(Sample(int(self._held[slot]), int(index),
                            tuple(view['tokens_BGT'][slot, index, :n].tolist()),
                            tuple(view['logp_BGT'][slot, index, :n].tolist()),
                            complete))
    self._held[self._handed.all(axis=1)] = -1
    return found

  def _fill(self) -> None:
    """Prefills waiting prompts of one width, as far as free slots reach."""
    free = np.flatnonzero(self._held < 0)
    width, chosen = self._queue[0].width, []
    while self._queue and len(chosen) < len(free) and (
        self._queue[0].width == width):
      chosen.append(self._queue.popleft())
    free = free[:len(chosen)]
    self._held[free] = [w.row for w in chosen]
    self._handed[free] = self._stopped[free] = False
    self._state = self.sampler.refill(
        self.variables, self._state, *self._inputs(chosen, free, width),
        self._seed, **self.how)

  def _inputs(self, chosen, free, width):
    """Arrays for the prefill, padded to few distinct shapes.

    Padding has slot number B, which is dropped on the device.
    """
    multiple = sharding.row_multiple(self.sampler.mesh)
    rows = 1 << (len(chosen) - 1).bit_length()
    rows = min(-(-rows // multiple) * multiple, self.slots)
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones(rows, np.int32)
    where = np.full(rows, self.slots, np.int32)
    groups = np.zeros(rows, np.uint32)
    for i, w in enumerate(chosen):
      tokens[i, :len(w.prompt)] = w.prompt
      lengths[i], where[i], groups[i] = len(w.prompt), free[i], w.group
    return sharding.put((tokens, lengths, where, groups), self._rows)

  def _ended(self, view, slot, index) -> tuple[int, bool]:
    """(number of tokens, complete), or (0, False) while a sample goes on."""
    age = int(view['age_B'][slot])
    end = int(view['length_BG'][slot, index])
    tokens = view['tokens_BGT'][slot, index, :end or age]
    stop = self.sampler.stop(tokens.tolist())
    if stop or end:
      return stop or end, True
    return (age, False) if age >= self.sampler.T else (0, False)


def padded(length: int) -> int:
  """A prompt's length with padding: few distinct ones."""
  return bucket(length, 32)
