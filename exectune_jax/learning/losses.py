"""Losses of the guide, as sums over tokens; the caller divides.

Shapes: B rows, L tokens of a row, T completion tokens of a row (slots), D
model, V vocabulary.
Masks come from lengths, never from token ids. Sums, not means, because one
global denominator over micro-batches and hosts is the only correct mean.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from exectune_jax.learning import sharding
from exectune_jax.models.attention import Rows
from exectune_jax.models.layers import matmul

CHUNK = 512  # tokens whose [chunk, V] logits exist at a time


def completion_logprobs(model, variables, batch, temperature: float = 1.0):
  """Log-probability of every completion token under the guide, [B, T].

  Args:
    model: Transformer.
    variables: its parameters (and adapters).
    batch: as made by `batches.lay_out`.
    temperature: logits are divided by it, as when sampling.

  Returns:
    logp_BT, 0 in empty slots.
  """
  rows = Rows(batch['positions_BL'], batch['segments_BL'],
              batch.get('prefix_BL'))
  hidden_BLD, _ = model.apply(variables, batch['tokens_BL'], rows)
  hidden_BTD = jnp.take_along_axis(hidden_BLD, batch['where_BT'][..., None],
                                   axis=1)
  logp_BT = token_logprobs(model, variables, hidden_BTD, batch['target_BT'],
                           temperature)
  return jnp.where(batch['mask_BT'] > 0, logp_BT, 0.0)


def token_logprobs(model, variables, hidden_BTD, target_BT, temperature=1.0):
  """log softmax(logits / temperature)[target], chunked over tokens.

  Never holds [B, T, V]: each chunk's logits are recomputed in the backward
  pass. Every device goes through the chunks of its own rows, and gradients of
  the projection meet once, after the last chunk.
  """
  kernel_DV = model.apply(variables, method='head_kernel')
  score = functools.partial(_chunked_logprobs, temperature)
  return sharding.over_head(score, model.mesh)(hidden_BTD, target_BT,
                                               kernel_DV)


def _chunked_logprobs(temperature, hidden_BTD, target_BT, kernel_DV):
  B, T, D = hidden_BTD.shape
  chunks = min(T, -(-B * T // CHUNK))
  size = -(-T // chunks)
  pad = ((0, 0), (0, chunks * size - T))
  h = jnp.pad(hidden_BTD, (*pad, (0, 0))).reshape(B, chunks, size, D)
  y = jnp.pad(target_BT, pad).reshape(B, chunks, size)

  @jax.checkpoint
  def one(chunk):
    hidden, target = chunk
    logits = matmul(hidden, kernel_DV, jnp.float32, None) / temperature
    chosen = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  logp = jax.lax.map(one, (h.swapaxes(0, 1), y.swapaxes(0, 1)))
  return logp.swapaxes(0, 1).reshape(B, -1)[:, :T]


def policy_loss(logp_BT, old_BT, sampler_BT, advantage_BT, mask_BT, *,
                clip_low: float, clip_high: float, tis_cap: float):
  """Clipped policy-gradient loss, summed over tokens (to minimise).

  min(r A, clip(r, 1 - low, 1 + high) A) with r = pi / pi_old (Schulman et
  al., 2017; asymmetric as in DAPO), weighted by truncated importance
  sampling min(pi_old / pi_sampler, cap), which corrects for a sampler that
  is older than, or rounds differently from, the trainer.

  Args:
    logp_BT: trainer's log-probs, differentiated.
    old_BT: trainer's log-probs before the first update on this batch.
    sampler_BT: log-probs under which the tokens were sampled.
    advantage_BT: of the completion that each token belongs to.
    mask_BT: 1 where a token counts.

  Returns:
    The sum, and a dict of summed diagnostics.
  """
  ratio = jnp.exp(logp_BT - old_BT)
  weight = importance_weight(old_BT, sampler_BT, tis_cap)
  adv = advantage_BT
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  gain = jnp.minimum(ratio * adv, clipped * adv)
  sums = {'clipped': jnp.sum(mask_BT * (ratio * adv > clipped * adv)),
          'tis_weight': jnp.sum(mask_BT * weight),
          'tis_weight_sq': jnp.sum(mask_BT * weight * weight),
          'neg_logp': -jnp.sum(mask_BT * logp_BT)}
  return -jnp.sum(mask_BT * weight * gain), sums


def importance_weight(old_BT, sampler_BT, cap: float):
  """min(pi_old / pi_sampler, cap), without gradient."""
  return jax.lax.stop_gradient(
      jnp.exp(jnp.minimum(old_BT - sampler_BT, jnp.log(cap))))


def kl_loss(logp_BT, ref_BT, weight_BT):
  """KL(guide || reference), summed over tokens: (loss, report).

  weight_BT is the mask times the importance weight of `policy_loss`, for
  tokens that an older guide sampled.

  The loss is k2 = (log ratio)^2 / 2, whose gradient on samples of the guide
  is that of the KL (k1 inside a loss has expected gradient zero, and k3's is
  that of the reverse KL). Reported is k3, which is unbiased and positive
  (Schulman, "Approximating KL divergence").
  """
  delta = logp_BT - ref_BT
  k3 = jnp.exp(-delta) - 1 + delta
  return (0.5 * jnp.sum(weight_BT * delta * delta),
          jax.lax.stop_gradient(jnp.sum(weight_BT * k3)))
