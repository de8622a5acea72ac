"""Samples strategies, continuously: a prompt is prefilled once for its group.

Shapes: B slots for prompts, L prompt tokens, G samples of a prompt, T new
tokens, V vocabulary, N layers, K kv heads, Q head size.

The device holds a grid of B prompts with G samples each. Decoding runs in
jitted chunks; after each chunk the samples that have ended are handed out, so
that the core can start on them, and a slot whose samples have all ended takes
the next prompt of the queue. A sample's randomness depends on its seed, group
and index alone, not on what else is in the grid. Several processes sample
together: each is given all prompts and is handed all samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from exectune_jax.learning import sharding
from exectune_jax.models import attention
from exectune_jax.models.attention import DecodeView
from exectune_jax.models.transformer import init_variables
from exectune_jax.sampling.grid import Grid, Sample, padded
from exectune_jax.sampling.pick import pick

CHUNK = 8  # new tokens between two looks at what has ended


class Sampler:
  """Compiled sampling functions for one model and mesh.

  Args:
    model: Transformer.
    end: id of the end token.
    max_new_tokens: T.
    mesh: the training mesh.
    stop: from a sample's tokens to how many of them to keep, or None to go
      on; called on the host after each chunk.
    int8: whether keys and values are kept in 8 bits.
    gather: whether slices of weights over fsdp come together once for all
      tokens, and not for each one; costs their memory in the compute dtype.
  """

  def __init__(self, model, end: int, max_new_tokens: int, mesh,
               stop: Callable[[Sequence[int]], int | None] = lambda _: None,
               int8: bool = False, gather: bool = True):
    self.model, self.mesh, self.T, self.stop = model, mesh, max_new_tokens, stop
    self.int8, self.gather = int8, gather
    common = dict(model=model, end=end, mesh=mesh)
    how = ('temperature', 'top_k', 'top_p')
    self.refill = jax.jit(functools.partial(_refill, **common),
                          static_argnames=how, donate_argnames='state')
    self.chunk = jax.jit(functools.partial(_chunk, **common),
                         static_argnames=how, donate_argnames='state')
    self.empty = jax.jit(self._make, static_argnums=(0, 1, 2))
    whole = sharding.replicated(mesh)
    # What a process reads, it must hold whole.
    self.view = (lambda x: x) if whole.is_fully_addressable else jax.jit(
        lambda x: x, out_shardings=whole)

  def sample(self, variables, prompts: Sequence[Sequence[int]],
             groups: Sequence[int], group_size: int, *, seed: int,
             temperature: float, top_k: int = 0, top_p: float = 1.0,
             slots: int = 0) -> Iterator[Sample]:
    """Yields group_size samples of every prompt, as they end.

    Args:
      variables: of the model.
      prompts: token ids.
      groups: a number per prompt that seeds its samples.
      group_size: G.
      seed: base seed.
      temperature: 0 for the most likely tokens.
      top_k, top_p: 0 and 1 for no truncation, which training needs.
      slots: B, prompts decoded at a time; 0 for all. What is compiled
        depends on it, and not on how many prompts there are.
    """
    if temperature < 0:
      raise ValueError(f'temperature={temperature}: 0 or more')
    if not prompts:
      return
    grid = self.grid(self.prepare(variables), slots or len(prompts), group_size,
                     max(map(len, prompts)), seed=seed,
                     temperature=temperature, top_k=top_k, top_p=top_p)
    # Short ones first: neighbours have one width and are prefilled together.
    for row in sorted(range(len(prompts)),
                      key=lambda i: padded(len(prompts[i]))):
      grid.add(row, prompts[row], groups[row])
    while grid.busy:
      yield from grid.step()

  def grid(self, variables, slots: int, group_size: int, longest: int, *,
           seed: int, temperature: float, top_k: int = 0,
           top_p: float = 1.0) -> Grid:
    """A grid without prompts, for prompts that come while it runs.

    Args:
      variables: as `prepare` makes them.
      longest: tokens of the longest prompt; the others as for `sample`.
    """
    multiple = sharding.row_multiple(self.mesh)
    return Grid(self, variables, -(-slots // multiple) * multiple,
                group_size, padded(longest), seed, temperature=temperature,
                top_k=top_k, top_p=top_p)

  @functools.cached_property
  def prepare(self):
    """Compiled: weights as decoding wants them, which reads all per token."""
    shapes = jax.eval_shape(
        lambda: init_variables(self.model, jax.random.key(0)))
    return jax.jit(functools.partial(_cast, self.model.config.dtype),
                   out_shardings=self._places(shapes))

  def _places(self, variables):
    """Where `prepare` puts the weights."""
    return sharding.shardings(variables, self.mesh, whole=self.gather)

  def _make(self, B, G, L):
    """A grid without any prompt."""
    c = self.model.config
    def cache(*shape):
      x = jnp.zeros((c.layers, B, *shape, c.kv_heads, c.head_dim), c.dtype)
      return attention.store(x, self.int8)
    return sharding.constrain_sampling({
        'slot': jnp.zeros((), jnp.int32),
        'age_B': jnp.full((B,), self.T, jnp.int32),
        'prompt_len_B': jnp.ones((B,), jnp.int32),
        'length_BG': jnp.ones((B, G), jnp.int32),  # 0: not ended yet
        'tokens_BGT': jnp.zeros((B, G, self.T), jnp.int32),
        'logp_BGT': jnp.zeros((B, G, self.T)),
        'key_BG': jnp.zeros((B, G, 2), jnp.uint32),
        'prompt_kv': (cache(L), cache(L)),
        'new_kv': (cache(G, self.T), cache(G, self.T))}, self.mesh)

  def lower(self, variables, B: int, G: int, L: int) -> dict:
    """The programs for B prompts of L tokens, not yet compiled.

    Args:
      variables: abstract.
      B, G, L: prompts at a time, samples of each, prompt tokens.
    """
    rows = sharding.rows(self.mesh)
    state = jax.eval_shape(functools.partial(self._make, B, G, L))
    state = sharding.place(state, sharding.sampling(state, self.mesh))
    variables = jax.eval_shape(functools.partial(
        _cast, self.model.config.dtype), variables)
    variables = sharding.place(variables, self._places(variables))
    def array(shape, dtype, where=rows):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    inputs = (array((B, L), jnp.int32), array((B,), jnp.int32),
              array((B,), jnp.int32), array((B,), jnp.uint32),
              array((), jnp.uint32, sharding.replicated(self.mesh)))
    how = dict(temperature=1.0, top_k=0, top_p=1.0)
    return {'prefill': self.refill.lower(variables, state, *inputs, **how),
            'decode': self.chunk.lower(variables, state,
                                        array((B, G), jnp.bool), **how)}


def _cast(dtype, variables):
  """Weights rounded as the model rounds them when it uses them."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x if path[-1].key == 'scale' else x.astype(dtype),
      variables)


def _refill(variables, state, tokens_RL, lengths_R, where_R, groups_R, seed,
            *, model, end, mesh, **how):
  """Prefills R prompts into slots and samples the first token of each."""
  hidden, kv = model.apply(variables, tokens_RL)
  last = jnp.take_along_axis(hidden, (lengths_R - 1)[:, None, None], axis=1)
  logits_R1V = model.apply(variables, last, method='logits')
  G = state['length_BG'].shape[1]
  def member_keys(group):
    key = jax.random.fold_in(jax.random.key(seed), group)
    members = jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(G))
    return jax.random.key_data(members)
  keys_RG = jax.vmap(member_keys)(groups_R)
  first = jnp.zeros((len(groups_R),), jnp.int32)
  token, logp = pick(
      jnp.broadcast_to(logits_R1V, (*keys_RG.shape[:2], logits_R1V.shape[-1])),
      keys_RG, first, **how)

  def put(name, value):
    return state[name].at[where_R].set(value, mode='drop')
  def put_kv(cache, x):
    return cache.at[:, where_R, :x.shape[2]].set(x, mode='drop')
  int8 = isinstance(state['prompt_kv'][0], tuple)
  stored = tuple(attention.store(x, int8) for x in kv)
  return sharding.constrain_sampling({
      **state, 'age_B': put('age_B', 1),
      'prompt_len_B': put('prompt_len_B', lengths_R),
      'length_BG': put('length_BG', (token == end).astype(jnp.int32)),
      'tokens_BGT': state['tokens_BGT'].at[where_R, :, 0].set(token,
                                                             mode='drop'),
      'logp_BGT': state['logp_BGT'].at[where_R, :, 0].set(logp, mode='drop'),
      'key_BG': put('key_BG', keys_RG),
      'prompt_kv': jax.tree.map(put_kv, state['prompt_kv'], stored)}, mesh)


def _chunk(variables, state, stopped_BG, *, model, end, mesh, **how):
  """Up to CHUNK more tokens of every slot; stops early when all have ended.

  stopped_BG: samples that the host has ended.
  """
  T = state['tokens_BGT'].shape[-1]
  B, G = stopped_BG.shape
  rows = jnp.arange(B)
  state = {**state, 'length_BG': jnp.where(
      stopped_BG & (state['length_BG'] == 0), state['age_B'][:, None],
      state['length_BG'])}

  def running(s):
    return (s['length_BG'] == 0) & (s['age_B'] < T)[:, None]

  def body(carry):
    i, s = carry
    age, slot = s['age_B'], s['slot']
    going = running(s)
    fed = s['tokens_BGT'][rows, :, age - 1]
    hidden, kv = model.apply(
        variables, fed, s['prompt_kv'], s['new_kv'],
        DecodeView(s['prompt_len_B'], age - 1, slot, G), method='decode')
    logits = model.apply(variables, hidden, method='logits')
    token, logp = pick(logits, s['key_BG'], age, **how)
    def put(name, value):
      at = s[name].at[rows, :, age]
      return at.set(jnp.where(going, value, 0), mode='drop')
    return i + 1, {
        **s, 'new_kv': kv, 'slot': (slot + 1) % T,
        'age_B': jnp.minimum(age + 1, T),
        'length_BG': jnp.where(going & (token == end), age[:, None] + 1,
                               s['length_BG']),
        'tokens_BGT': put('tokens_BGT', token),
        'logp_BGT': put('logp_BGT', logp)}

  _, state = jax.lax.while_loop(
      lambda c: (c[0] < CHUNK) & jnp.any(running(c[1])), body, (0, state))
  return sharding.constrain_sampling(state, mesh)
