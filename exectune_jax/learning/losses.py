"""Losses of the guide, as sums over tokens; the caller divides.

Shapes: B rows, L tokens of a row, T completion slots, D model, V vocabulary.
Masks come from lengths, never from token ids. Sums, not means, because one
global denominator over micro-batches and hosts is the only correct mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK = 512  # tokens whose [chunk, V] logits exist at a time


def completion_logprobs(model, params, batch, slots: int,
                        temperature: float = 1.0):
  """Log-probability of every completion token under the guide.

  Args:
    model: Transformer.
    params: its parameters.
    batch: tokens_BL (prompt, completion, padding), prompt_len_B,
      completion_len_B.
    slots: T, at least the longest completion.
    temperature: logits are divided by it, as when sampling.

  Returns:
    logp_BT (0 in empty slots) and mask_BT.
  """
  tokens_BL = batch['tokens_BL']
  hidden_BLD, _ = model.apply({'params': params}, tokens_BL)
  slot_T = jnp.arange(slots)
  where_BT = jnp.clip(batch['prompt_len_B'][:, None] - 1 + slot_T, 0,
                      tokens_BL.shape[1] - 2)
  hidden_BTD = jnp.take_along_axis(hidden_BLD, where_BT[..., None], axis=1)
  target_BT = jnp.take_along_axis(tokens_BL, where_BT + 1, axis=1)
  mask_BT = (slot_T < batch['completion_len_B'][:, None]).astype(jnp.float32)
  logp_BT = token_logprobs(model, params, hidden_BTD, target_BT, temperature)
  return logp_BT * mask_BT, mask_BT


def token_logprobs(model, params, hidden_BTD, target_BT, temperature=1.0):
  """log softmax(logits / temperature)[target], chunked over tokens.

  Never holds [B, T, V]: each chunk's logits are recomputed in the backward
  pass.
  """
  B, T, D = hidden_BTD.shape
  chunks = -(-B * T // CHUNK)
  size = -(-B * T // chunks)
  pad = chunks * size - B * T
  h = jnp.pad(hidden_BTD.reshape(B * T, D), ((0, pad), (0, 0)))
  y = jnp.pad(target_BT.reshape(B * T), (0, pad))

  @jax.checkpoint
  def one(chunk):
    hidden, target = chunk
    logits = model.apply({'params': params}, hidden, method='logits')
    logits = logits / temperature
    chosen = jnp.take_along_axis(logits, target[:, None], -1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  logp = jax.lax.map(one, (h.reshape(chunks, size, D),
                           y.reshape(chunks, size)))
  return logp.reshape(-1)[:B * T].reshape(B, T)


def policy_loss(logp_BT, old_BT, sampler_BT, advantage_B, mask_BT, *,
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
    advantage_B: one per row.
    mask_BT: 1 where a token counts.

  Returns:
    The sum, and a dict of summed diagnostics.
  """
  ratio = jnp.exp(logp_BT - old_BT)
  weight = importance_weight(old_BT, sampler_BT, tis_cap)
  adv = advantage_B[:, None]
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
