import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exectune_jax.config import default_config
from exectune_jax.learning import batches, losses, sharding
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_variables)
from exectune_jax.sampling.pick import pick
from exectune_jax.sampling.sampler import Sampler

END, SLOTS = 0, 20
PROMPTS = [[5, 6, 7, 8], [9], [3] * 37, [1, 2, 3]]


@pytest.fixture(scope='module')
def setup():
  return make(sharding.make_mesh(default_config().mesh))


def make(mesh):
  model = Transformer(TransformerConfig(
      vocab=12, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8,
      mlp_dim=48), mesh)
  params = jax.jit(lambda key: init_variables(model, key))(jax.random.key(0))
  params = jax.tree.map(lambda x: 1.5 * x, params)
  params['params']['embed']['embedding'] *= 6  # far from uniform
  params = jax.device_put(params, sharding.shardings(params, mesh))
  return model, params, Sampler(model, END, SLOTS, mesh)


def draw(setup, prompts, groups, size=5, temperature=1.0, seed=0, **more):
  _, params, sampler = setup
  found = list(sampler.sample(params, prompts, groups, size, seed=seed,
                              temperature=temperature, **more))
  assert len(found) == len({(s.row, s.index) for s in found})
  return {(groups[s.row], s.index): s for s in found}


def trainer_logprobs(model, params, samples, temperature):
  """The trainer's log-probs of samples, one row a group, in slots."""
  groups = sorted({g for g, _ in samples})
  rows = [[samples[k] for k in sorted(samples) if k[0] == g] for g in groups]
  batch = batches.lay_out([
      [batches.Block(PROMPTS[g], [s.tokens for s in row])]
      for g, row in zip(groups, rows, strict=True)])
  logp = jax.jit(lambda p, b: losses.completion_logprobs(
      model, p, b, temperature))(params, batch)
  return logp, batches.lay_slots([[s.logprobs for s in row] for row in rows],
                                 logp.shape[1])


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('slots', [0, 2])
def test_log_probs_equal_the_trainers(setup, temperature, slots):
  """Also where prompts take over slots whose samples have ended."""
  model, params, _ = setup
  samples = draw(setup, PROMPTS, range(4), temperature=temperature,
                 slots=slots)
  assert len(samples) == 20
  np.testing.assert_allclose(*trainer_logprobs(model, params, samples,
                                               temperature),
                             atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('slots', [1, 2, 3])
def test_refilled_slots_give_the_same_samples(setup, slots):
  """Seven prompts through few slots; every wave starts at another time."""
  prompts = [*PROMPTS, [4, 4, 9], [8] * 33, [7]]
  together = draw(setup, prompts, range(7))
  few = draw(setup, prompts, range(7), slots=slots)
  assert {k: s.tokens for k, s in few.items()} == {
      k: s.tokens for k, s in together.items()}
  for k, s in few.items():
    np.testing.assert_allclose(s.logprobs, together[k].logprobs, atol=1e-5)
    assert s.complete == together[k].complete


def test_a_stop_ends_a_sample_where_it_says(setup):
  """Stop at the first token 3, found on the host after a chunk."""
  model, params, sampler = setup
  plain = draw(setup, PROMPTS, range(4))
  def stop(tokens):
    return tokens.index(3) + 1 if 3 in tokens else None
  other = Sampler(model, END, SLOTS, sampler.mesh, stop)
  stopped = draw((model, params, other), PROMPTS, range(4), slots=2)
  hit = 0
  for key, s in plain.items():
    n = stop(list(s.tokens)) or len(s.tokens)
    assert stopped[key].tokens == s.tokens[:n]
    assert stopped[key].complete == (s.complete or n < len(s.tokens)
                                     or s.tokens[-1] == 3)
    hit += n < len(s.tokens)
  assert hit > 3


def test_bfloat16_log_probs_are_near_the_trainers(setup):
  """Both round in the same places; what differs is the order of sums."""
  model, params, sampler = setup
  half = Transformer(dataclasses.replace(model.config, dtype='bfloat16'))
  samples = draw((half, params, Sampler(half, END, SLOTS, sampler.mesh)),
                 PROMPTS, range(4), slots=2)
  trainer, kept = trainer_logprobs(half, params, samples, 1.0)
  difference = np.abs(np.asarray(trainer) - kept)
  assert difference.max() <= 1e-3


def test_an_int8_cache_changes_log_probs_little(setup):
  """Rounding to 127 steps; measured 0.04 at worst on this random model."""
  model, params, sampler = setup
  small = Sampler(model, END, SLOTS, sampler.mesh, int8=True)
  samples = draw((model, params, small), PROMPTS, range(4), slots=2)
  trainer, kept = trainer_logprobs(model, params, samples, 1.0)
  worst = np.abs(np.asarray(trainer) - kept).max()
  assert 1e-5 < worst < 0.15
  state = jax.eval_shape(lambda: small.empty(4, 5, 64))
  steps, scales = state['prompt_kv'][0]
  assert steps.dtype == np.int8 and scales.shape == (*steps.shape[:-1], 1)


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
    hidden, _ = model.apply(params, row[None])
    return model.apply(params, hidden[0, length - 1], method='logits')
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


LOGITS = jnp.array([2.0, 1.0, 0.0, -1.0, -30.0])


def counts_of(n, temperature, **how):
  keys = jax.random.key_data(jax.vmap(jax.random.key)(jnp.arange(n)))[None]
  tokens, logp = jax.jit(functools.partial(
      pick, temperature=temperature, **how))(
      jnp.broadcast_to(LOGITS, (1, n, 5)), keys, jnp.zeros(1, jnp.int32))
  np.testing.assert_allclose(
      logp[0, :50], jax.nn.log_softmax(LOGITS / temperature)[tokens[0, :50]],
      atol=1e-5)
  return np.bincount(np.asarray(tokens)[0], minlength=5)


@pytest.mark.parametrize('temperature, how, kept', [
    (1.0, {}, 5), (0.5, {}, 5), (1.0, {'top_k': 3}, 3),
    # the chances are .64, .24, .09, .03: .88 reach .7, .64 alone reaches .5
    (1.0, {'top_p': 0.7}, 2), (1.0, {'top_p': 0.5}, 1),
    (1.0, {'top_k': 2, 'top_p': 0.99}, 2)])
def test_pick_has_the_distribution_of_truncated_softmax(temperature, how,
                                                        kept):
  n = 40_000
  chance = np.array(jax.nn.softmax(LOGITS / temperature))
  chance[kept:] = 0
  chance /= chance.sum()
  for c, p in zip(counts_of(n, temperature, **how), chance, strict=True):
    assert abs(c - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)) + (p > 0)


_EIGHT = """
import json, sys
sys.path.insert(0, 'tests')
import test_sampler
from test_sampler import *
def main(sizes):
  config = default_config()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
  setup = test_sampler.make(sharding.make_mesh(config.mesh))
  found = draw(setup, PROMPTS, range(4), slots=2)
  return [[k, s.tokens, s.logprobs] for k, s in sorted(found.items())]
print(json.dumps([main((2, 2, 2)), main((1, 1, 8))]))
"""


def test_eight_devices_sample_what_one_does(setup):
  env = dict(os.environ, NPROC='32',
             XLA_FLAGS='--xla_force_host_platform_device_count=8')
  done = subprocess.run([sys.executable, '-c', _EIGHT], env=env, timeout=240,
                        capture_output=True, text=True, check=True)
  one = draw(setup, PROMPTS, range(4))
  for found in json.loads(done.stdout):
    assert len(found) == len(one)
    for key, tokens, logprobs in found:
      assert tuple(tokens) == one[tuple(key)].tokens
      # float32 sums in another order; values reach -4
      np.testing.assert_allclose(logprobs, one[tuple(key)].logprobs, atol=3e-5)
