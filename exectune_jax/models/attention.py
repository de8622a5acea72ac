"""What attends to what, and the kernels that compute it.

Shapes: B rows or prompts, L tokens of a row, G samples of a prompt, T slots
for new tokens, H heads, K kv heads, Q head size, N layers. Queries come
scaled.

Training rows hold blocks: a prompt and one or more completions of it, each
of which sees the prompt and itself (Rows). Decoding keeps the keys and values
of a prompt once for its G samples, and those of new tokens in a ring: slot
number `view.slot` is written by all samples at once, whenever each of them
began.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash)

from exectune_jax.learning import sharding

LANES = 128  # rows of a multiple of this can use the TPU kernel
FAR = 1 << 30  # a window that never ends
NEVER = -1e30  # finite, so that a row without any key gives no NaN


@dataclasses.dataclass(frozen=True)
class Rows:
  """Training or prefill rows.

  positions: of each token in its own text, [B, L].
  segments: which text a token belongs to, 0 for padding, [B, L]; None if
    every row is one text.
  prefix: segment of the prompt that a token continues, or its own, [B, L];
    None if no prompt has several completions.
  """
  positions: jax.Array
  segments: jax.Array | None = None
  prefix: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class How:
  """What is known about attention when a program is compiled.

  kernel: a key of KERNELS. window: of layers that have one. mesh: over which
  kernels that the compiler can't divide are spread; None: one device.
  """
  kernel: str
  window: int
  mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass(frozen=True)
class DecodeView:
  """What a decode step may look at.

  prompt_len_B: valid prompt tokens.
  age_B: how many new tokens each prompt's samples were fed before this one.
  slot: ring slot that this step writes.
  samples: G.
  """
  prompt_len_B: jax.Array
  age_B: jax.Array
  slot: jax.Array
  samples: int

  @property
  def positions(self):
    here = (self.prompt_len_B + self.age_B)[:, None]
    return jnp.broadcast_to(here, (here.shape[0], self.samples))


jax.tree_util.register_dataclass(Rows)
jax.tree_util.register_dataclass(
    DecodeView, data_fields=['prompt_len_B', 'age_B', 'slot'],
    meta_fields=['samples'])


# ----------------------------------------------------------- full passes

def over_rows(q_BLHQ, k_BLKQ, v_BLKQ, rows: Rows, window, how: How):
  """Attention within rows, [B, L, H, Q].

  Args:
    q_BLHQ, k_BLKQ, v_BLKQ: scaled queries, keys, values.
    rows: the layout.
    window: tokens that this layer looks back (traced), or None.
    how: what is known when compiling.
  """
  return KERNELS[how.kernel](q_BLHQ, k_BLKQ, v_BLKQ, rows, window, how)


def mask_of(rows: Rows, window):
  """[B, L, L] of bool, True where a query (axis 1) may see a key (axis 2)."""
  L = rows.positions.shape[1]
  mask = jnp.tril(jnp.ones((L, L), bool))[None]
  if rows.segments is not None:
    key = rows.segments[:, None, :]
    seen = key == rows.segments[:, :, None]
    if rows.prefix is not None:
      seen |= key == rows.prefix[:, :, None]
    mask &= seen
  if window is not None:
    mask &= rows.positions[:, :, None] - rows.positions[:, None, :] < window
  return mask


def _xla(q, k, v, rows, window, how, implementation='xla'):
  del how
  if rows.segments is None and window is None:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=1.0,
                                        implementation=implementation)
  return jax.nn.dot_product_attention(
      q, k, v, mask=mask_of(rows, window)[:, None], scale=1.0,
      implementation=implementation)


def _cudnn(q, k, v, rows, window, how):
  return _xla(q, k, v, rows, window, how, 'cudnn')


def _splash(q, k, v, rows, window, how, interpret=False):
  """TPU kernel that skips what the mask hides and never stores the scores.

  It knows segments but not shared prompts, and wants rows of whole blocks;
  for other rows the plain computation.
  """
  L = q.shape[1]
  if rows.prefix is not None or L % LANES:
    return _xla(q, k, v, rows, window, how)
  block = max(b for b in (512, 256, LANES) if L % b == 0)
  sizes = kernels.BlockSizes(**{name: block for name in (
      'block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv',
      'block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')})

  def attend(q, k, v, segments, window):
    def with_mask(mask):
      kernel = kernels.make_splash_mha(
          splash.MultiHeadMask([mask] * q.shape[2]), head_shards=1,
          q_seq_shards=1, block_sizes=sizes, interpret=interpret)
      def one(q, k, v, ids):
        heads_first = (x.swapaxes(0, 1) for x in (q, k, v))
        return kernel(*heads_first, segment_ids=None if ids is None else
                      kernels.SegmentIds(ids, ids)).swapaxes(0, 1)
      return lambda: jax.vmap(one)(q, k, v, segments)
    far = with_mask(splash.CausalMask((L, L)))
    if window is None:
      return far()
    near = with_mask(splash.LocalMask((L, L), (how.window - 1, 0), 0))
    return jax.lax.cond(window < FAR, near, far)

  return sharding.over_rows(attend, how.mesh)(q, k, v, rows.segments, window)


KERNELS = {
    'xla': _xla,  # any platform
    'cudnn': _cudnn,  # NVIDIA GPUs, 16 bits
    'splash': _splash,  # TPU
    'splash_interpret': functools.partial(_splash, interpret=True),  # tests
}


def choose(kernel: str, platform: str, dtype: str) -> str:
  """The kernel behind 'auto': what is fastest on a platform."""
  if kernel != 'auto':
    return kernel
  if platform == 'tpu':
    return 'splash'
  return 'cudnn' if (platform, dtype) == ('gpu', 'bfloat16') else 'xla'


# -------------------------------------------------------------- decoding

def store(x, int8: bool):
  """Keys or values as a cache holds them: as they are, or as (int8, scales).

  int8 rounds each head's vector to 127 steps of its largest entry.
  """
  if not int8:
    return x
  scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127
  steps = jnp.round(x / jnp.maximum(scale, 1e-30))
  return steps.astype(jnp.int8), scale.astype(x.dtype)


def load(stored, dtype):
  """What `store` was given, up to rounding."""
  if not isinstance(stored, tuple):
    return stored
  steps, scale = stored
  return steps.astype(dtype) * scale.astype(dtype)


def append(caches, kv, layer, view: DecodeView):
  """Writes new keys and values [B, G, K, Q] of one layer into its ring slot.

  Returns:
    the caches of all layers, and those of this layer.
  """
  def write(cache, x):
    return jax.lax.dynamic_update_slice(
        cache, x[None, :, :, None], (layer, 0, 0, view.slot, 0, 0))
  def layer_of(cache):
    return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
  caches = tuple(
      jax.tree.map(write, cache, store(x, isinstance(cache, tuple)))
      for cache, x in zip(caches, kv, strict=True))
  return caches, jax.tree.map(layer_of, caches)


def decode(q_BGHQ, prompt_kv, new_kv, view: DecodeView, window):
  """One query per sample against its prompt and its own new tokens.

  Args:
    q_BGHQ: scaled queries.
    prompt_kv: stored keys and values [B, L, K, Q], shared by the G samples.
    new_kv: stored keys and values [B, G, T, K, Q], a ring.
    view: what may be seen.
    window: tokens to look back, or None.

  Returns:
    [B, G, H, Q]
  """
  (kp, vp), (kn, vn) = (tuple(load(x, q_BGHQ.dtype) for x in kv)
                        for kv in (prompt_kv, new_kv))
  B, G, H, Q = q_BGHQ.shape
  L, T, K = kp.shape[1], kn.shape[2], kp.shape[2]
  q = q_BGHQ.reshape(B, G, K, H // K, Q)
  on_prompt = jnp.einsum('bgkrq,blkq->bgkrl', q, kp,
                         preferred_element_type=jnp.float32)
  on_new = jnp.einsum('bgkrq,bgtkq->bgkrt', q, kn,
                      preferred_element_type=jnp.float32)
  sees_BL, sees_BT = _visible(view, window, L, T)
  scores = jnp.concatenate([
      jnp.where(sees_BL[:, None, None, None], on_prompt, NEVER),
      jnp.where(sees_BT[:, None, None, None], on_new, NEVER)], -1)
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  # Rounded once, as in the full pass.
  out = (jnp.einsum('bgkrl,blkq->bgkrq', weights[..., :L], vp,
                    preferred_element_type=jnp.float32)
         + jnp.einsum('bgkrt,bgtkq->bgkrq', weights[..., L:], vn,
                      preferred_element_type=jnp.float32))
  return out.astype(q.dtype).reshape(B, G, H, Q)


def _visible(view: DecodeView, window, L: int, T: int):
  """Which prompt tokens [B, L] and ring slots [B, T] a step may look at."""
  here_B1 = (view.prompt_len_B + view.age_B)[:, None]
  back_T = (view.slot - jnp.arange(T)) % T  # how long ago a slot was written
  prompt = jnp.arange(L) < view.prompt_len_B[:, None]
  new = back_T <= view.age_B[:, None]
  if window is not None:
    prompt &= here_B1 - jnp.arange(L) < window
    new &= back_T < window
  return prompt, new
