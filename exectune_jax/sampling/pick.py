"""From logits to a token and its log-probability.

Shapes: B prompts, G samples of a prompt, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pick(logits_BGV, key_BG, age_B, temperature: float, top_k: int = 0,
         top_p: float = 1.0):
  """Samples by inverse transform: one uniform number a sample.

  Args:
    logits_BGV: float32.
    key_BG: key data of each sample, uint32 [B, G, 2].
    age_B: number of the token, folded into the key.
    temperature: 0 for the most likely token.
    top_k: only the k most likely tokens; 0 for all.
    top_p: only the most likely tokens that together reach p.

  Returns:
    tokens [B, G], and their log-probabilities under
    softmax(logits / temperature) before any truncation.
  """
  logits = logits_BGV / (temperature or 1.0)
  logp = jax.nn.log_softmax(logits, axis=-1)
  if temperature == 0:
    token = jnp.argmax(logits, axis=-1)
  else:
    def uniform(data, age):
      key = jax.random.fold_in(jax.random.wrap_key_data(data), age)
      return jax.random.uniform(key)
    u_BG = jax.vmap(jax.vmap(uniform, (0, None)))(key_BG, age_B)
    chance = jnp.where(_kept(logp, top_k, top_p), jnp.exp(logp), 0.0)
    mass = jnp.cumsum(chance, axis=-1)
    token = jnp.sum(mass <= u_BG[..., None] * mass[..., -1:], axis=-1)
    token = jnp.minimum(token, logits.shape[-1] - 1)
  token = token.astype(jnp.int32)
  return token, jnp.take_along_axis(logp, token[..., None], -1)[..., 0]


def _kept(logp, top_k, top_p):
  """Which tokens may be drawn."""
  if not top_k and top_p >= 1:
    return True
  ranked = jnp.sort(logp, axis=-1, descending=True)
  if top_k:
    least = ranked[..., top_k - 1:top_k]
    ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
  chance = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(chance, axis=-1) - chance
  kept = (before < top_p) & (ranked > -jnp.inf)
  last = jnp.sum(kept, axis=-1, keepdims=True) - 1
  return logp >= jnp.take_along_axis(ranked, last, -1)
