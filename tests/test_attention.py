"""Kernels against a loop over what each query may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exectune_jax.models import attention
from exectune_jax.models.attention import FAR, How, Rows

B, L, H, K, Q = 2, 256, 4, 2, 16


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(0, 1, (B, L, n, Q)).astype(np.float32)
             for n in (H, K, K))
  cuts = [(100, 70, 50), (250, 3)]  # lengths of texts; the rest is padding
  segments, positions = np.zeros((2, B, L), np.int32)
  for row, lengths in enumerate(cuts):
    at = 0
    for i, n in enumerate(lengths, 1):
      segments[row, at:at + n] = i
      positions[row, at:at + n] = np.arange(n)
      at += n
  return q, k, v, Rows(positions, segments)


def by_hand(q, k, v, sees):
  """Softmax attention with numpy; sees[b, i, j]."""
  k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
  scores = np.einsum('bihq,bjhq->bhij', q, k, dtype=np.float64)
  scores = np.where(sees[:, None], scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('bhij,bjhq->bihq', weights, v)


def visible(rows, window):
  """The definition, one pair at a time."""
  sees = np.zeros((B, L, L), bool)
  for b in range(B):
    for i in range(L):
      for j in range(i + 1):
        same = rows.segments[b, j] == rows.segments[b, i] or (
            rows.prefix is not None
            and rows.segments[b, j] == rows.prefix[b, i])
        far = rows.positions[b, i] - rows.positions[b, j] >= (window or FAR)
        sees[b, i, j] = same and not far
  return sees


@pytest.mark.parametrize('kernel', ['xla', 'splash_interpret'])
@pytest.mark.parametrize('window', [None, 20, FAR])
def test_rows_of_several_texts(kernel, window):
  q, k, v, rows = inputs()
  how = How(kernel, 20)
  traced = None if window is None else jnp.array(window)
  found = jax.jit(lambda w: attention.over_rows(q, k, v, rows, w, how))(traced)
  expected = by_hand(q, k, v, visible(rows, window))
  real = rows.segments > 0
  np.testing.assert_allclose(np.asarray(found)[real], expected[real],
                             atol=2e-5)


@pytest.mark.parametrize('kernel', ['xla', 'splash_interpret'])
def test_completions_see_their_shared_prompt_only(kernel):
  q, k, v, rows = inputs()
  rows = Rows(np.array(rows.positions), rows.segments, rows.segments.copy())
  rows.prefix[rows.segments == 2] = 1
  rows.prefix[rows.segments == 3] = 1
  rows.positions[0, 170:220] = np.arange(100, 150)
  found = attention.over_rows(q, k, v, rows, None, How(kernel, 1))
  expected = by_hand(q, k, v, visible(rows, None))
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_gradients_of_the_tpu_kernel_are_those_of_xla():
  q, k, v, rows = inputs()
  weight = np.random.default_rng(1).normal(0, 1, q.shape) * (
      rows.segments > 0)[..., None, None]
  def loss(qkv, kernel):
    out = attention.over_rows(*qkv, rows, jnp.array(20), How(kernel, 20))
    return jnp.sum(out * weight)
  grads = [jax.jit(jax.grad(loss), static_argnums=1)((q, k, v), kernel)
           for kernel in ('xla', 'splash_interpret')]
  for a, b in zip(*grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_kernel_follows_the_platform():
  choose = attention.choose
  assert choose('auto', 'tpu', 'bfloat16') == 'splash'
  assert choose('auto', 'gpu', 'bfloat16') == 'cudnn'
  assert choose('auto', 'gpu', 'float32') == 'xla'
  assert choose('auto', 'cpu', 'bfloat16') == 'xla'
  assert choose('cudnn', 'cpu', 'float32') == 'cudnn'
