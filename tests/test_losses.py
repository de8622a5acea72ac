"""Closed forms, enumeration and golden numbers for the losses."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exectune_jax.learning import batches, losses
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_variables)

LOOSE = dict(clip_low=0.2, clip_high=0.28, tis_cap=1e9)


@pytest.fixture(scope='module')
def small():
  model = Transformer(TransformerConfig(
      vocab=4, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=24))
  return model, jax.jit(lambda key: init_variables(model, key))(
      jax.random.key(3))


def test_clip_table_of_the_golden_file(shared):
  golden = json.loads((shared / 'golden/grpo_golden.json').read_text())
  for name, value in golden['clip(0.2,0.28)'].items():
    r, a = (float(x.split('=')[1]) for x in name.split(','))
    loss, _ = losses.policy_loss(
        jnp.log(jnp.array([[r]])), jnp.zeros((1, 1)), jnp.zeros((1, 1)),
        jnp.array([[a]]), jnp.ones((1, 1)), clip_low=0.2, clip_high=0.28,
        tis_cap=2.0)
    assert loss == pytest.approx(value, abs=1e-6)
  weights = golden['tis token C=2, logdiff [-1,.5,1.5]']
  for diff, weight in zip((-1.0, 0.5, 1.5), weights, strict=True):
    _, sums = losses.policy_loss(
        jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.array([[-diff]]),
        jnp.ones((1, 1)), jnp.ones((1, 1)), clip_low=0.2, clip_high=0.28,
        tis_cap=2.0)
    assert sums['tis_weight'] == pytest.approx(weight, rel=1e-6)


def test_two_by_three_tokens_by_hand():
  """Ratios (1.1, 0.7, -) and (1.5, 1, 0.9); A = (1, -0.5); second masked
  after two tokens; weights 1.

  Row 1: min(1.1, 1.1) + min(0.7, 0.8) = 1.8, the third token is masked.
  Row 2 (A = -0.5): min(-.75, -.64) + -.5 + min(-.45, -.45) = -1.7.
  """
  ratio = jnp.array([[1.1, 0.7, 9.0], [1.5, 1.0, 0.9]])
  old = jnp.full((2, 3), -1.0)
  mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
  loss, sums = losses.policy_loss(
      jnp.log(ratio) + old, old, old, jnp.array([[1.0] * 3, [-0.5] * 3]), mask,
      clip_low=0.2, clip_high=0.28, tis_cap=2.0)
  assert loss == pytest.approx(-(1.8 - 1.7), abs=1e-6)
  # clipping binds nowhere else than where it lowers the gain: not at
  # r = 1.5 with A < 0, and not at r = 0.7 with A > 0
  assert sums['clipped'] == 0


def _all_completions(length, vocab=4):
  return [list(c) for c in itertools.product(range(vocab), repeat=length)]


def _logps(model, params, completions, prompt=(1, 2)):
  """Log-probs [number of completions, their length]; one row holds half."""
  half = len(completions) // 2
  batch = batches.lay_out([[batches.Block(prompt, part)] for part in (
      completions[:half], completions[half:])])
  length = len(completions[0])
  logp = jax.jit(lambda p: losses.completion_logprobs(
      model, p, jax.tree.map(jnp.asarray, batch)))(params)
  return logp[:, :half * length].reshape(-1, length)


def test_probabilities_sum_to_one(small):
  logp = _logps(*small, _all_completions(3))
  assert np.exp(np.sum(np.asarray(logp), 1)).sum() == pytest.approx(1, abs=1e-5)


def test_gradient_is_the_analytic_policy_gradient(small):
  """All 64 completions of 3 tokens over a vocabulary of 4, weighted by their
  probability, give minus the gradient of the expected reward exactly."""
  model, params = small
  completions = _all_completions(3)
  reward = jnp.array([0.3 * c[0] - 0.7 * (c[1] == c[2]) + (c == [3, 1, 0])
                      for c in completions], jnp.float32)

  def expected_reward(p):
    logp = _logps(model, p, completions)
    return jnp.sum(jnp.exp(logp.sum(1)) * reward)

  def grpo(p):
    logp = _logps(model, p, completions)
    old = jax.lax.stop_gradient(logp)
    chance = jnp.exp(old.sum(1))
    advantage = reward - jnp.sum(chance * reward)  # any constant baseline
    weighted = jnp.repeat((advantage * chance)[:, None], 3, 1)
    return losses.policy_loss(logp, old, old, weighted, jnp.ones_like(logp),
                              **LOOSE)[0]

  assert_same(jax.jit(jax.grad(grpo))(params),
              jax.jit(jax.grad(lambda p: -expected_reward(p)))(params))


def test_importance_weights_undo_another_sampler(small):
  """One-token completions drawn from another policy, cap out of reach."""
  model, params = small
  other = jax.tree.map(lambda x: 0.5 * x, params)
  completions = _all_completions(1)
  reward = jnp.array([1.0, -2.0, 0.5, 0.0])
  q = _logps(model, other, completions)

  def grpo(p):
    logp = _logps(model, p, completions)
    return losses.policy_loss(
        logp, jax.lax.stop_gradient(logp), q, reward[:, None] * jnp.exp(q),
        jnp.ones_like(logp), **LOOSE)[0]

  def expected_reward(p):
    logp = _logps(model, p, completions)
    return -jnp.sum(jnp.exp(logp[:, 0]) * reward)

  assert_same(jax.jit(jax.grad(grpo))(params),
              jax.jit(jax.grad(expected_reward))(params))


def test_equal_rewards_give_exactly_zero_gradient(small):
  model, params = small
  completions = _all_completions(2)
  def grpo(p):
    logp = _logps(model, p, completions)
    old = jax.lax.stop_gradient(logp)
    return losses.policy_loss(logp, old, old, jnp.zeros_like(logp),
                              jnp.ones_like(logp), **LOOSE)[0]
  grads = jax.jit(jax.grad(grpo))(params)
  assert all(not np.any(x) for x in jax.tree.leaves(grads))


def test_kl_gradient_and_value_by_enumeration():
  logits = jnp.array([0.5, -1.0, 0.3, 1.2, 0.0])
  ref = jax.nn.log_softmax(jnp.array([0.1, 0.4, -0.6, 0.9, 0.2]))

  def kl(x):
    logp = jax.nn.log_softmax(x)
    return jnp.sum(jnp.exp(logp) * (logp - ref))

  def sampled(x, part):
    logp = jax.nn.log_softmax(x)
    chance = jax.lax.stop_gradient(jnp.exp(logp))
    return sum(chance[a] * losses.kl_loss(
        logp[a][None, None], ref[a][None, None], jnp.ones((1, 1)))[part]
        for a in range(5))

  np.testing.assert_allclose(jax.grad(sampled)(logits, 0), jax.grad(kl)(logits),
                             atol=1e-6)
  assert sampled(logits, 1) == pytest.approx(float(kl(logits)), abs=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 0.5, 2.0])
def test_chunked_log_probs_equal_plain_ones(small, temperature, monkeypatch):
  model, params = small
  monkeypatch.setattr(losses, 'CHUNK', 5)  # 3 chunks, the last one padded
  hidden = jax.random.normal(jax.random.key(0), (2, 7, 16))
  target = jax.random.randint(jax.random.key(1), (2, 7), 0, 4)

  def plain(p, h):
    logits = model.apply(p, h, method='logits') / temperature
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, target[..., None], -1)[..., 0]

  def chunked(p, h):
    return losses.token_logprobs(model, p, h, target, temperature)

  np.testing.assert_allclose(chunked(params, hidden), plain(params, hidden),
                             atol=1e-6)
  weights = jax.random.normal(jax.random.key(2), (2, 7))
  grads = [jax.jit(jax.grad(
      lambda p, h, f=f: jnp.sum(weights * f(p, h)), (0, 1)))(params, hidden)
           for f in (chunked, plain)]
  assert_same(*grads)


def test_padding_and_row_mates_do_not_matter(small):
  """Three blocks in two rows, against each of their texts on its own."""
  model, params = small
  blocks = [batches.Block([1, 2, 3], [[2, 0], [3, 3, 1]]),
            batches.Block([1], [[3, 3, 1, 0]]), batches.Block([2, 2], [[1]])]
  batch = batches.lay_out([[blocks[0], blocks[1]], [blocks[2]]])
  score = jax.jit(lambda b: losses.completion_logprobs(model, params, b))
  together = np.asarray(score(batch))
  assert batch['mask_BT'].sum(1).tolist() == [9, 1]
  assert batch['segments_BL'].max(1).tolist() == [4, 1]
  assert not np.any(together[batch['mask_BT'] == 0])
  alone = [score(batches.lay_out([[batches.Block(b.prompt, [c])]]))[0, :len(c)]
           for b in blocks for c in b.completions]
  np.testing.assert_allclose(together[0, :9], np.concatenate(alone[:3]),
                             atol=1e-6)
  np.testing.assert_allclose(together[1, :1], alone[3], atol=1e-6)


def test_rows_are_laid_out_as_documented():
  batch = batches.lay_out([[batches.Block([5, 6], [[7, 8, 9], [4]]),
                            batches.Block([3], [[2]])]], 8)
  first = {name: value[0, :8].tolist() for name, value in batch.items()}
  # the last token of a completion is predicted but never read
  assert first['tokens_BL'] == [5, 6, 7, 8, 3, 0, 0, 0]
  assert first['positions_BL'] == [0, 1, 2, 3, 0, 0, 0, 0]
  assert first['segments_BL'] == [1, 1, 2, 2, 4, 0, 0, 0]
  assert first['prefix_BL'] == [1, 1, 1, 1, 4, 0, 0, 0]
  assert first['where_BT'] == [1, 2, 3, 1, 4, 0, 0, 0]
  assert first['target_BT'] == [7, 8, 9, 4, 2, 0, 0, 0]
  assert first['mask_BT'] == [1, 1, 1, 1, 1, 0, 0, 0]
  with pytest.raises(ValueError, match='row of 5 tokens does not fit 4'):
    batches.lay_out([[batches.Block([1] * 5, [[1]])]], 4)


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-6)
