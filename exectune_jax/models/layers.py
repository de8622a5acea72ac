"""What the decoder's blocks are made of: norm, rotation, products.

Shapes: B rows, L tokens, H heads, Q head size.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from exectune_jax.learning import sharding


def rope(x_BLHQ, positions_BL, freq):
  """Rotary position embedding, halves rotated as in Llama."""
  angle = positions_BL[:, :, None, None].astype(jnp.float32) * freq
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  x1, x2 = jnp.split(x_BLHQ.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return out.astype(x_BLHQ.dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x, kernel, out_dtype, where):
  """x W in the dtype of x, with the gradient of W summed in float32.

  Args:
    x: [..., in], in the compute dtype.
    kernel: [in, out], float32.
    out_dtype: of the result.
    where: sharding.Placed of the kernel, or None on one device: its slices
      come together for the product, in the compute dtype, and its gradient
      is summed over devices into the slices.
  """
  return jnp.matmul(x, _whole(kernel, x, where),
                    preferred_element_type=out_dtype)


def _whole(kernel, x, where):
  return sharding.constrain(kernel.astype(x.dtype), where and where.whole)


def _matmul_forward(x, kernel, out_dtype, where):
  return matmul(x, kernel, out_dtype, where), (x, kernel)


def _matmul_backward(out_dtype, where, residuals, dy):
  x, kernel = residuals
  dy = dy.astype(x.dtype)
  dx = jnp.matmul(dy, _whole(kernel, x, where).T)
  over = tuple(range(x.ndim - 1))
  dw = jax.lax.dot_general(x, dy, ((over, over), ((), ())),
                           preferred_element_type=jnp.float32)
  return dx, sharding.constrain(dw, where and where.sliced)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
  """x W + b, with a low-rank update x A B (Hu et al., 2021) if rank > 0.

  A and B live in the collection 'lora', so that they can be trained and
  saved without W. B starts at zero.
  """
  features: int
  use_bias: bool
  rank: int
  alpha: float
  mesh: jax.sharding.Mesh | None

  @nn.compact
  def __call__(self, x):
    width, dtype = x.shape[-1], x.dtype
    kernel = self.param('kernel', nn.initializers.lecun_normal(),
                        (width, self.features), jnp.float32)
    y = matmul(x, kernel, dtype, sharding.placed(
        f'{self.name}/kernel', kernel.shape, self.mesh))
    if self.rank:
      a = self.variable('lora', 'a', lambda: nn.initializers.lecun_normal()(
          self.make_rng('params'), (width, self.rank), jnp.float32)).value
      b = self.variable('lora', 'b', jnp.zeros, (self.rank, self.features),
                        jnp.float32).value
      low = matmul(x, a, dtype, None)
      y += matmul(low, b, dtype, None) * (self.alpha / self.rank)
    if self.use_bias:
      y += self.param('bias', nn.initializers.zeros, (self.features,),
                      jnp.float32).astype(dtype)
    return y


class Weights(nn.Module):
  """A matrix and nothing else: the embeddings, the vocabulary projection."""
  param_name: str
  shape: tuple[int, int]
  init: Any

  def setup(self):
    self.value = self.param(self.param_name, self.init, self.shape,
                            jnp.float32)

  def __call__(self):
    return self.value
