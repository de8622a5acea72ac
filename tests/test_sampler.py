import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exectune_jax.config import default_config
from exectune_jax.learning import batches, losses, sharding
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_params)
from exectune_jax.sampling.sampler import Sampler, pick

END, SLOTS = 0, 20
PROMPTS = [[5, 6, 7, 8], [9], [3] * 37, [1, 2, 3]]


@pytest.fixture(scope='module')
def setup():
  model = Transformer(TransformerConfig(
      vocab=12, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48))
  params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
  params = jax.tree.map(lambda x: 1.5 * x, params)
  params['embed']['embedding'] *= 6  # far from uniform
  mesh = sharding.make_mesh(default_config().mesh)
  return model, params, Sampler(model, END, SLOTS, mesh)


def draw(setup, prompts, groups, size=5, temperature=1.0, seed=0):
  _, params, sampler = setup
  found = list(sampler.sample(params, prompts, groups, size, seed=seed,
                              temperature=temperature))
  return {(groups[s.row], s.index): s for s in found}


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_log_probs_equal_the_trainers(setup, temperature):
  model, params, _ = setup
  samples = draw(setup, PROMPTS, range(4), temperature=temperature)
  assert len(samples) == 20
  rows = sorted(samples)
  batch = batches.pack_rows([PROMPTS[g] for g, _ in rows],
                            [list(samples[r].tokens) for r in rows])
  logp, _ = jax.jit(lambda p, b: losses.completion_logprobs(
      model, p, b, SLOTS, temperature))(params, batch)
  kept = batches.pad_slots([samples[r].logprobs for r in rows], SLOTS)
  np.testing.assert_allclose(logp, kept, atol=1e-5, rtol=1e-5)


def test_a_sample_depends_on_its_own_seed_only(setup):
  together = draw(setup, PROMPTS, range(4))
  for group in range(4):
    alone = draw(setup, [PROMPTS[group]], [group], size=2)
    for (g, i), s in alone.items():
      assert s.tokens == together[g, i].tokens
  assert len({s.tokens for s in draw(setup, [[5, 6]], [0], 8).values()}) > 4
  other = draw(setup, PROMPTS, range(4), seed=1)
  assert any(other[k].tokens != together[k].tokens for k in other)


def test_greedy_is_the_argmax_of_full_passes(setup):
  model, params, _ = setup
  @jax.jit
  def logits_of(row, length):
    hidden, _ = model.apply({'params': params}, row[None])
    return model.apply({'params': params}, hidden[0, length - 1],
                       method='logits')
  for (group, _), s in draw(setup, PROMPTS, range(4), 1, 0.0).items():
    row = np.zeros(64, np.int32)
    n = len(PROMPTS[group])
    row[:n] = PROMPTS[group]
    for token in s.tokens:
      assert int(jnp.argmax(logits_of(row, n))) == token
      row[n] = token
      n += 1


def test_ends_at_the_end_token_or_is_incomplete(setup):
  samples = draw(setup, PROMPTS, range(4), size=16)
  for s in samples.values():
    assert len(s.tokens) == len(s.logprobs) <= SLOTS
    assert (s.tokens[-1] == END) == s.complete
    assert END not in s.tokens[:-1]
    assert s.complete or len(s.tokens) == SLOTS
  assert {s.complete for s in samples.values()} == {True, False}


def test_finished_samples_come_out_before_the_rest(setup):
  _, params, sampler = setup
  lengths = [len(s.tokens) for s in sampler.sample(
      params, PROMPTS, range(4), 16, seed=0, temperature=1.0)]
  assert lengths[0] < max(lengths)
  # the first token comes with the prefill, then chunks of 8
  chunks = [max(n - 2, 0) // 8 for n in lengths]
  assert chunks == sorted(chunks)


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_pick_has_the_distribution_of_softmax(temperature):
  logits = jnp.array([2.0, 1.0, 0.0, -1.0, -30.0])
  n = 40_000
  keys = jax.vmap(jax.random.key)(jnp.arange(n))[None]
  tokens, logp = jax.jit(pick, static_argnums=3)(
      jnp.broadcast_to(logits, (1, n, 5)), keys, 0, temperature)
  chance = jax.nn.softmax(logits / temperature)
  counts = np.bincount(np.asarray(tokens)[0], minlength=5)
  for c, p in zip(counts, chance, strict=True):
    assert abs(c - n * p) < 4.5 * np.sqrt(n * p * (1 - p)) + 1
  np.testing.assert_allclose(logp[0, :50], jnp.log(chance)[tokens[0, :50]],
                             atol=1e-5)
