"""One decoder for all guides: Llama, Qwen 2.5 and 3, Gemma 3.

Shapes: B rows or prompts, L tokens of a row, G samples of a prompt, T slots
for new tokens, D model, H heads, K kv heads, Q head size, V vocabulary, N
layers, R rank of an adapter.

The same blocks run in two modes. A full pass maps rows of tokens to hidden
states and, for sampling, returns every layer's keys and values. A decode
step feeds one new token to each of the G samples of each prompt (attention.py
says what each may look at). Layers are scanned, so what differs between them
(rotary frequencies, windows) is data.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from exectune_jax.learning import sharding
from exectune_jax.models import attention
from exectune_jax.models.attention import DecodeView, Rows
from exectune_jax.models.layers import Linear, RMSNorm, Weights, matmul, rope

# What a layer keeps for its backward pass; the rest is computed again.
REMAT = {
    'none': None,  # keep everything
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Architecture of a guide, and how it is computed.

  query_scale: multiplies queries; 0 for head_dim ** -0.5.
  rope_scaling: (), ('linear', factor), or ('llama3', factor, low, high,
    original length).
  windows: tokens that each layer looks back, 0 for all; () if all see all.
  local_rope_theta: of layers with a window; 0 for rope_theta, unscaled.
  qk_norm, qkv_bias, scale_embeddings, norm_plus_one, post_norms, activation:
    what Qwen and Gemma change against Llama.
  dtype: of the computation; parameters are float32.
  remat: a key of REMAT.
  attention: a key of attention.KERNELS.
  lora_rank, lora_alpha, lora_targets: adapters on the linear layers whose
    names (q, k, v, o, gate, up, down) match the pattern; rank 0 for none.
  """
  vocab: int
  dim: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  rope_theta: float = 10_000.0
  rope_scaling: tuple = ()
  local_rope_theta: float = 0.0
  windows: tuple[int, ...] = ()
  query_scale: float = 0.0
  norm_eps: float = 1e-5
  tied: bool = True
  qk_norm: bool = False
  qkv_bias: bool = False
  scale_embeddings: bool = False
  norm_plus_one: bool = False
  post_norms: bool = False
  activation: str = 'silu'
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = 'xla'
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_targets: str = '.*'

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(f'heads={self.heads} must be a multiple of '
                       f'kv_heads={self.kv_heads}')
    if self.windows and len(self.windows) != self.layers:
      raise ValueError(f'windows={self.windows}: one for each of the '
                       f'{self.layers} layers')

  @property
  def scale(self) -> float:
    return self.query_scale or self.head_dim ** -0.5


def rope_frequencies(c: TransformerConfig) -> np.ndarray:
  """Radians per position, [N, Q/2] (Su et al., 2021; Llama 3.1's scaling).

  Llama 3.1 divides low frequencies by a factor, keeps high ones, and blends
  in between, measured by how many waves fit in the original length.
  """
  def bands(theta):
    half = np.arange(c.head_dim // 2, dtype=np.float64)
    return theta ** (-2 * half / c.head_dim)
  scaled = bands(c.rope_theta)
  if c.rope_scaling and c.rope_scaling[0] == 'linear':
    scaled = scaled / c.rope_scaling[1]
  elif c.rope_scaling:
    _, factor, low, high, original = c.rope_scaling
    waves = original * scaled / (2 * math.pi)
    keep = np.clip((waves - low) / (high - low), 0, 1)
    scaled = scaled * (keep + (1 - keep) / factor)
  local = bands(c.local_rope_theta) if c.local_rope_theta else scaled
  windows = c.windows or (0,) * c.layers
  return np.stack([local if w else scaled for w in windows]).astype(np.float32)


class Block(nn.Module):
  """Attention and gated MLP with residuals, normed before (and after)."""
  config: TransformerConfig
  mesh: jax.sharding.Mesh | None

  @nn.compact
  def __call__(self, carry, scanned, view):
    """One layer, in the form that nn.scan wants.

    Args:
      carry: (x, new_kv); x is [B, L, D] or [B, G, D] while decoding; new_kv
        is None, or every layer's cache of new tokens.
      scanned: (layer index, rotary frequencies, window or None, this layer's
        prompt cache or None).
      view: Rows in a full pass, DecodeView while decoding.

    Returns:
      carry, and this layer's (k, v) in a full pass.
    """
    c = self.config
    x, new_kv = carry
    layer, freq, window, prompt_kv = scanned
    q, k, v = self._qkv(self._norm('attn_norm')(x), view.positions, freq)
    if isinstance(view, Rows):
      out = attention.over_rows(q, k, v, view, window, attention.How(
          c.attention, max(c.windows, default=0) or 1, self.mesh))
    else:
      new_kv, mine = attention.append(new_kv, (k, v), layer, view)
      out = attention.decode(q, prompt_kv, mine, view, window)
    out = self._linear(c.dim, 'o')(out.reshape(*x.shape[:2], -1))
    x = x + (self._norm('post_attn_norm')(out) if c.post_norms else out)
    out = self._mlp(self._norm('mlp_norm')(x))
    x = x + (self._norm('post_mlp_norm')(out) if c.post_norms else out)
    x = sharding.constrain_rows(x, self.mesh)
    return (x, new_kv), ((k, v) if isinstance(view, Rows) else None)

  def _qkv(self, h, positions, freq):
    c = self.config
    q, k, v = (
        self._linear(heads * c.head_dim, name, c.qkv_bias)(h).reshape(
            *h.shape[:2], heads, c.head_dim)
        for name, heads in (('q', c.heads), ('k', c.kv_heads),
                            ('v', c.kv_heads)))
    if c.qk_norm:
      q, k = self._norm('q_norm')(q), self._norm('k_norm')(k)
    q, k = rope(q, positions, freq), rope(k, positions, freq)
    return q * jnp.asarray(c.scale, q.dtype), k, v

  def _mlp(self, h):
    c = self.config
    act = {'silu': nn.silu, 'gelu': nn.gelu}[c.activation]
    gate, up = (self._linear(c.mlp_dim, name)(h) for name in ('gate', 'up'))
    return self._linear(c.dim, 'down')(act(gate) * up)

  def _norm(self, name):
    return RMSNorm(self.config.norm_eps, self.config.norm_plus_one, name=name)

  def _linear(self, features, name, use_bias=False):
    c = self.config
    adapted = c.lora_rank and re.fullmatch(c.lora_targets, name)
    return Linear(features, use_bias, c.lora_rank if adapted else 0,
                  c.lora_alpha, self.mesh, name=name)


class Transformer(nn.Module):
  """Decoder-only language model; parameters in float32, stacked by layer.

  mesh: needed by attention kernels that the compiler can't divide by itself.
  """
  config: TransformerConfig
  mesh: jax.sharding.Mesh | None = None

  def setup(self):
    c = self.config
    self.embed = Weights('embedding', (c.vocab, c.dim),
                         nn.initializers.normal(0.02))
    block = Block if c.remat == 'none' else nn.remat(
        Block, prevent_cse=False, policy=REMAT[c.remat])
    self.blocks = nn.scan(
        block, variable_axes={'params': 0, 'lora': 0},
        split_rngs={'params': True}, in_axes=(0, nn.broadcast),
        length=c.layers)(c, self.mesh)
    self.final_norm = RMSNorm(c.norm_eps, c.norm_plus_one)
    if not c.tied:
      self.head = Weights('kernel', (c.dim, c.vocab),
                          nn.initializers.lecun_normal())

  def __call__(self, tokens_BL, rows: Rows | None = None):
    """Full pass over rows: hidden states and keys and values.

    Args:
      tokens_BL: the tokens.
      rows: what attends to what; without it, plain causal rows, in which
        padding stands after every real token.

    Returns:
      hidden [B, L, D]; (k, v), each [N, B, L, K, Q].
    """
    rows = rows or Rows(jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]),
                                         tokens_BL.shape))
    (x, _), kv = self.blocks((self._embed(tokens_BL), None),
                             self._scanned(None), rows)
    return self.final_norm(x), kv

  def decode(self, tokens_BG, prompt_kv, new_kv, view: DecodeView):
    """Feeds one token of every sample.

    Args:
      tokens_BG: the tokens.
      prompt_kv: cache of the prompts (attention.Cache), [N, B, L, K, Q].
      new_kv: cache of new tokens, [N, B, G, T, K, Q].
      view: what may be looked at.

    Returns:
      hidden [B, G, D] and the updated new_kv.
    """
    (x, new_kv), _ = self.blocks((self._embed(tokens_BG), new_kv),
                                 self._scanned(prompt_kv), view)
    return self.final_norm(x), new_kv

  def logits(self, hidden):
    """Float32 logits [..., V] of hidden states [..., D]."""
    kernel = self.head_kernel()
    # Products in the compute dtype, sums and result in float32.
    return matmul(hidden.astype(self.config.dtype), kernel, jnp.float32,
                  sharding.placed('head/kernel', kernel.shape, self.mesh))

  def head_kernel(self):
    """The vocabulary projection, [D, V]."""
    return self.embed().T if self.config.tied else self.head()

  def initialise(self, tokens_BL):
    """Touches every parameter; used with `init` only."""
    return self.logits(self(tokens_BL)[0])

  def _embed(self, tokens):
    x = jnp.take(self.embed(), tokens, axis=0).astype(self.config.dtype)
    x = sharding.constrain_rows(x, self.mesh)
    if self.config.scale_embeddings:
      x = x * jnp.asarray(self.config.dim ** 0.5, x.dtype)
    return x

  def _scanned(self, prompt_kv):
    c = self.config
    windows = jnp.array([w or attention.FAR for w in c.windows]
                        ) if any(c.windows) else None
    return (jnp.arange(c.layers), jnp.asarray(rope_frequencies(c)), windows,
            prompt_kv)


def init_variables(model: Transformer, key: jax.Array) -> dict[str, Any]:
  """Fresh {'params': ...} and, with adapters, {'lora': ...}; call under jit."""
  return dict(model.init(key, jnp.zeros((1, 8), jnp.int32),
                         method='initialise'))
