"""One decoder for all guides: RMSNorm, RoPE, grouped queries, gated MLP.

Shapes: B prompts or rows, L tokens of a row, G samples of a prompt, T new
tokens, D model, H heads, K kv heads, Q head size, V vocabulary, N layers.

The same blocks run in two modes. A full pass maps rows of tokens to hidden
states and, for sampling, returns every layer's keys and values. A decode
step feeds one new token to each of the G samples of each prompt: they read
the prompt's keys and values, stored once per prompt, and their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Architecture of a guide.

  qk_norm, qkv_bias, scale_embeddings, norm_plus_one and activation are what
  Qwen and Gemma change against Llama.
  """
  vocab: int
  dim: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tied: bool = True
  qk_norm: bool = False
  qkv_bias: bool = False
  scale_embeddings: bool = False
  norm_plus_one: bool = False
  activation: str = 'silu'
  dtype: str = 'float32'
  remat: bool = False

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(f'heads={self.heads} must be a multiple of '
                       f'kv_heads={self.kv_heads}')


@dataclasses.dataclass(frozen=True)
class DecodeView:
  """What a decode step may look at.

  prompt_len_B: valid prompt tokens; t: index of the token being fed.
  """
  prompt_len_B: jax.Array
  t: jax.Array


jax.tree_util.register_dataclass(DecodeView)


class RMSNorm(nn.Module):
  """y = x / rms(x) * scale, in float32 (Zhang and Sennrich, 2019)."""
  eps: float
  plus_one: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = self.param('scale', init, (x.shape[-1],), jnp.float32)
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
    return (y * (scale + self.plus_one)).astype(x.dtype)


def rope(x_BLHQ, positions_BL, theta: float):
  """Rotary position embedding (Su et al., 2021), halves rotated as in Llama."""
  half = x_BLHQ.shape[-1] // 2
  freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BL[:, :, None, None].astype(jnp.float32) * freq
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  x1, x2 = jnp.split(x_BLHQ.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return out.astype(x_BLHQ.dtype)


def decode_attention(q_BGHQ, prompt_kv, new_kv, view: DecodeView):
  """One query per sample against its prompt and its own new tokens.

  Args:
    q_BGHQ: queries.
    prompt_kv: keys and values [B, L, K, Q], shared by the G samples.
    new_kv: keys and values [B, G, T, K, Q]; slots after view.t are unused.
    view: lengths.

  Returns:
    [B, G, H, Q]
  """
  (kp, vp), (kn, vn) = prompt_kv, new_kv
  B, G, H, Q = q_BGHQ.shape
  K = kp.shape[2]
  q = q_BGHQ.reshape(B, G, K, H // K, Q) * Q ** -0.5
  L, T = kp.shape[1], kn.shape[2]
  on_prompt = jnp.einsum('bgkrq,blkq->bgkrl', q, kp,
                         preferred_element_type=jnp.float32)
  on_new = jnp.einsum('bgkrq,bgtkq->bgkrt', q, kn,
                      preferred_element_type=jnp.float32)
  seen = jnp.arange(L) < view.prompt_len_B[:, None]
  on_prompt = jnp.where(seen[:, None, None, None, :], on_prompt, -1e30)
  on_new = jnp.where(jnp.arange(T) <= view.t, on_new, -1e30)
  weights = jax.nn.softmax(jnp.concatenate([on_prompt, on_new], -1), axis=-1)
  weights = weights.astype(vp.dtype)
  out = (jnp.einsum('bgkrl,blkq->bgkrq', weights[..., :L], vp)
         + jnp.einsum('bgkrt,bgtkq->bgkrq', weights[..., L:], vn))
  return out.reshape(B, G, H, Q)


class Block(nn.Module):
  """Pre-norm attention and MLP with residuals."""
  config: TransformerConfig

  @nn.compact
  def __call__(self, carry, scanned, positions, view):
    """One layer, in the form that nn.scan wants.

    Args:
      carry: (x, new_kv); x is [B, L, D] or [B, G, D] while decoding; new_kv
        is None, or every layer's keys and values [N, B, G, T, K, Q].
      scanned: (layer index, this layer's prompt_kv or None).
      positions: position of each token of x.
      view: DecodeView while decoding, else None.

    Returns:
      carry, and this layer's (k, v) in a full pass.
    """
    c = self.config
    x, new_kv = carry
    layer, prompt_kv = scanned
    h = RMSNorm(c.norm_eps, c.norm_plus_one, name='attn_norm')(x)
    q, k, v = self._qkv(h, positions)
    if view is None:
      out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    else:
      new_kv = tuple(
          jax.lax.dynamic_update_slice(
              cache, x[None, :, :, None], (layer, 0, 0, view.t, 0, 0))
          for cache, x in zip(new_kv, (k, v), strict=True))
      mine = tuple(jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
                   for cache in new_kv)
      out = decode_attention(q, prompt_kv, mine, view)
    out = out.reshape(*x.shape[:2], c.heads * c.head_dim)
    x = x + self._dense(c.dim, 'o')(out)
    h = RMSNorm(c.norm_eps, c.norm_plus_one, name='mlp_norm')(x)
    gate = {'silu': nn.silu, 'gelu': nn.gelu}[c.activation](
        self._dense(c.mlp_dim, 'gate')(h))
    x = x + self._dense(c.dim, 'down')(gate * self._dense(c.mlp_dim, 'up')(h))
    return (x, new_kv), ((k, v) if view is None else None)

  def _qkv(self, h, positions):
    c = self.config
    q, k, v = (
        self._dense(heads * c.head_dim, name, c.qkv_bias)(h).reshape(
            *h.shape[:2], heads, c.head_dim)
        for name, heads in (('q', c.heads), ('k', c.kv_heads),
                            ('v', c.kv_heads)))
    if c.qk_norm:
      q = RMSNorm(c.norm_eps, c.norm_plus_one, name='q_norm')(q)
      k = RMSNorm(c.norm_eps, c.norm_plus_one, name='k_norm')(k)
    return rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta), v

  def _dense(self, features, name, use_bias=False):
    return nn.Dense(features, use_bias=use_bias, dtype=self.config.dtype,
                    param_dtype=jnp.float32, name=name)


class Head(nn.Module):
  """The untied vocabulary projection, [D, V]."""
  dim: int
  vocab: int

  def setup(self):
    self.weights = self.param('kernel', nn.initializers.lecun_normal(),
                              (self.dim, self.vocab), jnp.float32)

  def kernel(self):
    return self.weights


class Transformer(nn.Module):
  """Decoder-only language model; parameters in float32, stacked by layer."""
  config: TransformerConfig

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab, c.dim, dtype=c.dtype,
                          param_dtype=jnp.float32,
                          embedding_init=nn.initializers.normal(0.02))
    block = nn.remat(Block, prevent_cse=False) if c.remat else Block
    self.blocks = nn.scan(
        block, variable_axes={'params': 0}, split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast), length=c.layers)(c)
    self.final_norm = RMSNorm(c.norm_eps, c.norm_plus_one)
    if not c.tied:
      self.head = Head(c.dim, c.vocab)

  def __call__(self, tokens_BL):
    """Full pass over right-padded rows: hidden states and keys and values.

    Padding stands after every real token, so the causal mask hides it.

    Returns:
      hidden [B, L, D]; (k, v), each [N, B, L, K, Q].
    """
    B, L = tokens_BL.shape
    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    layers = jnp.arange(self.config.layers)
    (x, _), kv = self.blocks((self._embed(tokens_BL), None), (layers, None),
                             positions, None)
    return self.final_norm(x), kv

  def decode(self, tokens_BG, prompt_kv, new_kv, view: DecodeView):
    """Feeds token number view.t of every sample.

    Args:
      tokens_BG: the tokens.
      prompt_kv: (k, v) of the prompts, each [N, B, L, K, Q].
      new_kv: (k, v) of new tokens, each [N, B, G, T, K, Q].
      view: prompt lengths and the index t.

    Returns:
      hidden [B, G, D] and the updated new_kv.
    """
    positions = jnp.broadcast_to((view.prompt_len_B + view.t)[:, None],
                                 tokens_BG.shape)
    layers = jnp.arange(self.config.layers)
    (x, new_kv), _ = self.blocks((self._embed(tokens_BG), new_kv),
                                 (layers, prompt_kv), positions, view)
    return self.final_norm(x), new_kv

  def logits(self, hidden):
    """Float32 logits [..., V] of hidden states [..., D]."""
    dtype = self.config.dtype
    if self.config.tied:
      table, spec = self.embed.embedding, '...d,vd->...v'
    else:
      table, spec = self.head.kernel(), '...d,dv->...v'
    # Products in the compute dtype, sums and result in float32.
    return jnp.einsum(spec, hidden.astype(dtype), table.astype(dtype),
                      preferred_element_type=jnp.float32)

  def initialise(self, tokens_BL):
    """Touches every parameter; used with `init` only."""
    return self.logits(self(tokens_BL)[0])

  def _embed(self, tokens):
    x = self.embed(tokens)
    if self.config.scale_embeddings:
      x = x * jnp.asarray(self.config.dim ** 0.5, x.dtype)
    return x


def init_params(model: Transformer, key: jax.Array) -> Any:
  """Fresh parameters; call under jit."""
  return model.init(key, jnp.zeros((1, 8), jnp.int32),
                    method='initialise')['params']
