"""Samples strategies: each prompt is prefilled once for its whole group.

Shapes: B prompts, L prompt tokens, G samples of a prompt, T new tokens,
V vocabulary, N layers, K kv heads, Q head size.

Decoding runs in jitted chunks; after each chunk the samples that have ended
are handed out, so that the core can start on them while the rest goes on. A
sample's randomness depends on its seed, group and index alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from exectune_jax.learning import sharding
from exectune_jax.models.transformer import DecodeView

BUCKET = 32  # prompt lengths are multiples of it
CHUNK = 8  # new tokens between two looks at what has ended


@dataclasses.dataclass(frozen=True)
class Sample:
  """One finished sample.

  row, index: which prompt, and which of its G samples.
  logprobs: under softmax(logits / temperature); at temperature 0 under
    softmax(logits).
  complete: False if it ran out of tokens before the end token.
  """
  row: int
  index: int
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  complete: bool


class Sampler:
  """Compiled sampling functions for one model and mesh.

  Args:
    model: Transformer.
    end: id of the end token.
    max_new_tokens: T.
    mesh: the training mesh.
  """

  def __init__(self, model, end: int, max_new_tokens: int, mesh):
    self.mesh, self.slots = mesh, max_new_tokens
    common = dict(model=model, end=end)
    self._start = jax.jit(
        functools.partial(_start, **common, slots=max_new_tokens),
        static_argnames=('group_size', 'temperature'))
    self._chunk = jax.jit(functools.partial(_chunk, **common),
                          static_argnames=('temperature',),
                          donate_argnames=('state',))

  def sample(self, params, prompts: Sequence[Sequence[int]],
             groups: Sequence[int], group_size: int, *, seed: int,
             temperature: float) -> Iterator[Sample]:
    """Yields group_size samples of every prompt, as they end.

    Args:
      params: guide parameters.
      prompts: token ids.
      groups: a number per prompt that seeds its samples.
      group_size: G.
      seed: base seed.
      temperature: 0 for the most likely tokens.
    """
    if temperature < 0:
      raise ValueError(f'temperature={temperature}: 0 or more')
    count = len(prompts)
    pad = -count % sharding.row_multiple(self.mesh)
    prompts = [*prompts, *[prompts[-1]] * pad]
    groups = [*groups, *[groups[-1]] * pad]
    inputs = self._inputs(prompts, groups, seed)
    state, prefix = self._start(params, *inputs, group_size=group_size,
                                temperature=temperature)
    handed = np.zeros((count, group_size), bool)
    while not handed.all():
      state = self._chunk(params, prefix, state, temperature=temperature)
      t, length, tokens, logp = jax.device_get(
          (state['t'], state['length_BG'], state['tokens_BGT'],
           state['logp_BGT']))
      over = t >= self.slots
      ended = (length[:count] > 0) | over
      for row, index in zip(*np.nonzero(ended & ~handed), strict=True):
        n = int(length[row, index]) or self.slots
        yield Sample(int(row), int(index),
                   tuple(tokens[row, index, :n].tolist()),
                     tuple(logp[row, index, :n].tolist()),
                     bool(length[row, index]))
      handed |= ended

  def _inputs(self, prompts, groups, seed):
    longest = max(len(p) for p in prompts)
    length = -(-longest // BUCKET) * BUCKET
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, :len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    where = sharding.rows(self.mesh)
    return (*jax.device_put((tokens, lengths, np.array(groups, np.uint32)),
                            where),
            jax.device_put(np.uint32(seed), sharding.replicated(self.mesh)))


def pick(logits_BGV, keys_BG, t, temperature: float):
  """Samples a token by inverse transform, with its log-probability.

  One uniform number per sample instead of one per vocabulary entry.
  """
  logits = logits_BGV / (temperature or 1.0)
  logp = jax.nn.log_softmax(logits, axis=-1)
  if temperature == 0:
    token = jnp.argmax(logits, axis=-1)
  else:
    def uniform(key):
      return jax.random.uniform(jax.random.fold_in(key, t))
    u_BG = jax.vmap(jax.vmap(uniform))(keys_BG)
    mass = jnp.cumsum(jnp.exp(logp), axis=-1)
    token = jnp.sum(mass <= u_BG[..., None] * mass[..., -1:], axis=-1)
    token = jnp.minimum(token, logits.shape[-1] - 1)
  token = token.astype(jnp.int32)
  return token, jnp.take_along_axis(logp, token[..., None], -1)[..., 0]


def _start(params, tokens_BL, lengths_B, groups_B, seed, *, model, end, slots,
           group_size, temperature):
  """Prefills the prompts and samples the first token of every sample."""
  variables = {'params': params}
  hidden, kv = model.apply(variables, tokens_BL)
  last = jnp.take_along_axis(hidden, (lengths_B - 1)[:, None, None], axis=1)
  logits_B1V = model.apply(variables, last, method='logits')
  B, G = tokens_BL.shape[0], group_size
  def member_keys(group):
    key = jax.random.fold_in(jax.random.key(seed), group)
    return jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(G))
  keys_BG = jax.vmap(member_keys)(groups_B)
  token, logp = pick(jnp.broadcast_to(logits_B1V, (B, G, logits_B1V.shape[-1])),
                     keys_BG, 0, temperature)
  c = model.config
  empty = jnp.zeros((c.layers, B, G, slots, c.kv_heads, c.head_dim),
                    kv[0].dtype)
  state = {
      't': jnp.ones((), jnp.int32),
      'length_BG': (token == end).astype(jnp.int32),  # 0: not ended yet
      'tokens_BGT': jnp.zeros((B, G, slots), jnp.int32).at[..., 0].set(token),
      'logp_BGT': jnp.zeros((B, G, slots)).at[..., 0].set(logp),
      'kv': (empty, empty), 'keys_BG': keys_BG}
  return state, {'kv': kv, 'lengths_B': lengths_B}


def _chunk(params, prefix, state, *, model, end, temperature):
  """Up to CHUNK more tokens; stops early when all samples have ended."""
  variables = {'params': params}
  slots = state['tokens_BGT'].shape[-1]
  last = jnp.minimum(state['t'] + CHUNK, slots)

  def going(s):
    return (s['t'] < last) & ~jnp.all(s['length_BG'] > 0)

  def body(s):
    t = s['t']
    fed = jax.lax.dynamic_index_in_dim(s['tokens_BGT'], t - 1, 2, False)
    hidden, kv = model.apply(
        variables, fed, prefix['kv'], s['kv'],
        DecodeView(prefix['lengths_B'], t - 1), method='decode')
    logits = model.apply(variables, hidden, method='logits')
    token, logp = pick(logits, s['keys_BG'], t, temperature)
    ended = s['length_BG'] > 0
    return {**s, 't': t + 1, 'kv': kv,
            'length_BG': jnp.where(ended | (token != end), s['length_BG'],
                                   t + 1),
            'tokens_BGT': s['tokens_BGT'].at[:, :, t].set(
                jnp.where(ended, 0, token)),
            'logp_BGT': s['logp_BGT'].at[:, :, t].set(
                jnp.where(ended, 0.0, logp))}

  return jax.lax.while_loop(going, body, state)
