"""Training rows, laid out on the host in few distinct shapes.

A *block* is a prompt and one or more completions of it. In a row it stands as
prompt, completion, completion, ...; each completion sees the prompt and
itself, and its positions go on from the prompt's. So a GRPO group computes
its prompt once, and supervised examples (blocks of one completion) share a
row. Shapes: B rows, L tokens of a row, T completion tokens of a row (slots).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Block:
  """A prompt and its completions, as token ids."""
  prompt: Sequence[int]
  completions: Sequence[Sequence[int]]

  @property
  def length(self) -> int:
    # The last token of a completion is predicted, never read.
    return len(self.prompt) + sum(len(c) - 1 for c in self.completions)

  @property
  def slots(self) -> int:
    return sum(len(c) for c in self.completions)


def bucket(n: int, least: int) -> int:
  """n rounded up, by at most an eighth beyond 8 * least: few shapes."""
  step = max(least, 1 << max(0, n.bit_length() - 4))
  return -(-n // step) * step


def shape_of(rows: Sequence[Sequence[Block]]) -> tuple[int, int]:
  """(L, T) that hold the longest row, rounded up."""
  longest = max(sum(b.length for b in row) for row in rows)
  slots = max(sum(b.slots for b in row) for row in rows)
  return bucket(max(longest, 2), 16), bucket(max(slots, 1), 16)


def lay_out(rows: Sequence[Sequence[Block]], length: int = 0,
            slots: int = 0) -> dict:
  """Arrays for the update steps.

  Args:
    rows: the blocks of each row; a row may be empty.
    length, slots: L and T, or 0 for those of `shape_of`.

  Returns:
    tokens_BL, positions_BL, segments_BL (0 for padding) and, where a prompt
    has several completions, prefix_BL say what is read; where_BT (position
    that predicts), target_BT and mask_BT what is learned. Slots of a row are
    in the order of its completions.
  """
  L, T = shape_of(rows)
  L, T = length or L, slots or T
  longest = max(sum(b.length for b in row) for row in rows)
  if longest > L:
    raise ValueError(f'a row of {longest} tokens does not fit {L}')
  out = {name: np.zeros((len(rows), L), np.int32) for name in (
      'tokens_BL', 'positions_BL', 'segments_BL', 'prefix_BL')}
  out |= {name: np.zeros((len(rows), T), np.int32)
          for name in ('where_BT', 'target_BT')}
  out['mask_BT'] = np.zeros((len(rows), T), np.float32)
  for i, row in enumerate(rows):
    _fill({name: array[i] for name, array in out.items()}, row)
  if all(len(block.completions) == 1 for row in rows for block in row):
    del out['prefix_BL']  # kernels without shared prompts will do
  return out


def _fill(row, blocks) -> None:
  """Writes blocks into the arrays of one row."""
  at = slot = segment = 0

  def text(tokens, position, prefix=0, same=False):
    nonlocal at, segment
    segment += not same
    span = slice(at, at + len(tokens))
    row['tokens_BL'][span] = tokens
    row['positions_BL'][span] = np.arange(position, position + len(tokens))
    row['segments_BL'][span] = segment
    row['prefix_BL'][span] = prefix or segment
    at += len(tokens)
    return segment

  for block in blocks:
    p = len(block.prompt)
    prompt = text(block.prompt, 0)
    last = at - 1
    for completion in block.completions:
      span = slice(slot, slot + len(completion))
      row['where_BT'][span] = [last, *range(at, at + len(completion) - 1)][
          :len(completion)]
      row['target_BT'][span] = completion
      row['mask_BT'][span] = 1
      text(completion[:-1], p, prompt, same=len(block.completions) == 1)
      slot += len(completion)


def lay_slots(rows: Sequence[Sequence[Sequence[float]]], T: int) -> np.ndarray:
  """Values of completion tokens in their slots, [B, T], 0 elsewhere.

  rows: for each row, the values of each completion.
  """
  out = np.zeros((len(rows), T), np.float32)
  for i, row in enumerate(rows):
    flat = [v for values in row for v in values]
    out[i, :len(flat)] = flat
  return out


def permutation(count: int, seed: int, position: int, size: int) -> list[int]:
  """Indices of batch number `position` in an endless shuffled stream.

  Every epoch is a fresh permutation; the position alone decides the batch,
  so resuming needs no iterator state.
  """
  chosen = []
  for i in range(position * size, (position + 1) * size):
    epoch, offset = divmod(i, count)
    chosen.append(int(_order(count, seed, epoch)[offset]))
  return chosen


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(count)


class PackedStream:
  """An endless shuffled stream of rows, each holding several examples.

  Every epoch is shuffled and packed anew, first fit among the last open
  rows; the position alone decides the rows.

  Args:
    lengths: tokens of each example.
    row_length: tokens of a row.
    seed: of the shuffles.
  """
  OPEN = 64  # rows that are looked at for a place

  def __init__(self, lengths: Sequence[int], row_length: int, seed: int):
    self.lengths, self.row_length, self.seed = lengths, row_length, seed
    self._epochs: list[list[list[int]]] = []

  def rows(self, position: int, size: int) -> list[list[int]]:
    """Examples of each of the rows of batch number `position`."""
    first, found = position * size, []
    epoch = 0
    while len(found) < size:
      while epoch >= len(self._epochs):
        self._epochs.append(self._pack(len(self._epochs)))
      rows = self._epochs[epoch]
      found += rows[max(0, first):max(0, first) + size - len(found)]
      first -= len(rows)
      epoch += 1
    return found

  def _pack(self, epoch):
    rows, room = [], []
    for i in _order(len(self.lengths), self.seed, epoch).tolist():
      n = self.lengths[i]
      start = max(0, len(rows) - self.OPEN)
      for r in range(start, len(rows)):
        if room[r] >= n:
          break
      else:
        r = len(rows)
        rows.append([])
        room.append(self.row_length)
      rows[r].append(i)
      room[r] -= n
    return rows
