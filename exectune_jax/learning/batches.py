"""Rows for the update steps, padded on the host to few distinct shapes."""

from __future__ import annotations

import functools

import numpy as np

BUCKET = 16  # row lengths are multiples, so that few programs are compiled


def pack_rows(prompts, completions) -> dict[str, np.ndarray]:
  """Right-padded rows of prompt and completion.

  Args:
    prompts, completions: lists of token id lists, B each.

  Returns:
    tokens_BL int32, prompt_len_B, completion_len_B.
  """
  longest = max(len(p) + len(c)
                for p, c in zip(prompts, completions, strict=True))
  length = -(-longest // BUCKET) * BUCKET
  tokens = np.zeros((len(prompts), length), np.int32)
  for row, (prompt, completion) in enumerate(
      zip(prompts, completions, strict=True)):
    tokens[row, :len(prompt)] = prompt
    tokens[row, len(prompt):len(prompt) + len(completion)] = completion
  return {'tokens_BL': tokens,
          'prompt_len_B': np.array([len(p) for p in prompts], np.int32),
          'completion_len_B': np.array([len(c) for c in completions],
                                       np.int32)}


def pad_slots(values, slots: int) -> np.ndarray:
  """Lists of floats as a zero-padded [B, T] float32 array."""
  out = np.zeros((len(values), slots), np.float32)
  for row, value in enumerate(values):
    out[row, :len(value)] = value
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
