"""Update steps: golden numbers, micro-batches, devices, shardings."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from exectune_jax.config import default_config
from exectune_jax.errors import UserError
from exectune_jax.learning import batches, sharding, steps
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_params)

SLOTS = 6


def one_update(kind: str, micro_batch: int = 0, mesh_sizes=(-1, 1, 1),
               change=lambda batch: None, kl=0.0):
  """Loss, gradient norm and a fingerprint of the updated parameters."""
  config = default_config()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh_sizes
  mesh = sharding.make_mesh(config.mesh)
  model = Transformer(TransformerConfig(
      vocab=16, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48))
  tx = steps.optimizer(config.optim, 1e-2, 1)
  shapes, where = steps.state_shardings(model, tx, mesh)
  rng = np.random.default_rng(0)
  # weights from numpy, so that the numbers below hold on any JAX version
  def draw(path, leaf):
    if 'scale' in jax.tree_util.keystr(path):
      return np.ones(leaf.shape, np.float32)
    return rng.normal(0, 0.3, leaf.shape).astype(np.float32)
  params = jax.tree_util.tree_map_with_path(draw, shapes.params)
  state = steps.new_state(jax.device_put(params, where.params), tx, where)
  lengths = rng.integers(1, SLOTS + 1, 8)
  batch = batches.pack_rows(
      [rng.integers(0, 16, n).tolist() for n in rng.integers(1, 9, 8)],
      [rng.integers(0, 16, n).tolist() for n in lengths])
  if kind == 'sft':
    step = steps.sft_step(model, tx, SLOTS, micro_batch)
  else:
    step = steps.grpo_step(model, tx, SLOTS, clip_low=0.2, clip_high=0.28,
                           tis_cap=2.0, temperature=0.9, kl=kl,
                           micro_batch=micro_batch)
    batch |= {'sampler_logp_BT': rng.normal(-2.5, 0.5, (8, SLOTS)).astype(
                  np.float32),
              'advantage_B': rng.normal(0, 1, 8).astype(np.float32),
              'valid_B': np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32)}
    if kl:
      batch['reference_logp_BT'] = rng.normal(-2.5, 0.5, (8, SLOTS)).astype(
          np.float32)
    change(batch)
  state, metrics = steps.compile_step(step, mesh, where)(
      state, jax.device_put(batch, sharding.rows(mesh)))
  leaves = jax.device_get(jax.tree.leaves(state.params))
  return [float(metrics['loss']), float(metrics['grad_norm']),
          *[float(np.abs(x).sum()) for x in leaves]]


GOLDEN = {  # loss and gradient norm
    'sft': (3.686123, 6.084008),
    'grpo': (0.371359, 4.011867),
    'kl': (0.605861, 6.630266),
}


@pytest.mark.parametrize('kind', ['sft', 'grpo'])
def test_golden_step(kind):
  """Change these numbers only together with a deliberate change of the loss,
  the model or the batch layout, and say so in the commit."""
  found = one_update(kind)
  np.testing.assert_allclose(found[:2], GOLDEN[kind], rtol=1e-4)


@pytest.mark.parametrize('kind', ['sft', 'grpo'])
def test_micro_batches_give_the_whole_batchs_update(kind):
  whole = one_update(kind)
  for micro in (1, 2, 4):
    np.testing.assert_allclose(one_update(kind, micro), whole, rtol=1e-5)


_EIGHT = """
import json, sys
sys.path.insert(0, 'tests')
from test_steps import one_update
print(json.dumps([one_update(k, m, s) for k, m, s in [
    ('sft', 0, (8, 1, 1)), ('grpo', 0, (2, 2, 2)), ('grpo', 4, (1, 4, 2))]]))
"""


def test_eight_devices_give_the_update_of_one():
  env = dict(
      os.environ, JAX_PLATFORMS='cpu',
      NPROC='32',  # JAX 0.10 deadlocks with fewer threads than this needs
      XLA_FLAGS='--xla_force_host_platform_device_count=8 '
      '--xla_cpu_collective_call_warn_stuck_timeout_seconds=20 '
      '--xla_cpu_collective_call_terminate_timeout_seconds=60')
  done = subprocess.run([sys.executable, '-c', _EIGHT], env=env, timeout=240,
                        capture_output=True, text=True, check=True)
  sft, grpo, micro = json.loads(done.stdout)
  np.testing.assert_allclose(sft, one_update('sft'), rtol=1e-5)
  np.testing.assert_allclose(grpo, one_update('grpo'), rtol=1e-5)
  np.testing.assert_allclose(micro, one_update('grpo'), rtol=1e-5)


def test_an_invalid_row_takes_no_part():
  """Row 3 has valid_B = 0: other tokens and advantage, same update."""
  def change(batch):
    batch['tokens_BL'][3] = 15 - batch['tokens_BL'][3]
    batch['advantage_B'][3] = 1e3
    batch['sampler_logp_BT'][3] -= 1.0
  assert one_update('grpo', change=change) == one_update('grpo')


def test_the_kl_term_has_its_own_weight():
  """Golden numbers, a penalty that is positive, and micro-batches."""
  plain = one_update('grpo')
  with_kl = one_update('grpo', kl=0.5)
  np.testing.assert_allclose(with_kl[:2], GOLDEN['kl'], rtol=1e-4)
  assert with_kl[0] > plain[0]
  np.testing.assert_allclose(one_update('grpo', 2, kl=0.5), with_kl, rtol=1e-5)


def test_every_parameter_has_a_rule_and_meshes_must_fit():
  config = default_config()
  mesh = sharding.make_mesh(config.mesh)
  for extra in ({}, dict(tied=False, qk_norm=True, qkv_bias=True)):
    model = Transformer(TransformerConfig(
        vocab=16, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8,
        mlp_dim=48, **extra))
    shapes = jax.eval_shape(lambda m=model: init_params(m, jax.random.key(0)))
    assert len(jax.tree.leaves(sharding.shardings(shapes, mesh))) == len(
        jax.tree.leaves(shapes))
  with pytest.raises(ValueError, match='no sharding rule'):
    sharding.shardings({'mystery': np.zeros((2, 2))}, mesh)
  config.mesh.fsdp = 3
  with pytest.raises(UserError, match=r'mesh=\(-1, 3, 1\)'):
    sharding.make_mesh(config.mesh)


def test_optimizer_is_adamw_with_linear_warmup():
  config = default_config()
  tx = steps.optimizer(config.optim, 1e-2, 4)
  params = {'x': np.array([1.0], np.float32)}
  state = tx.init(params)
  moves = []
  for _ in range(6):
    updates, state = tx.update({'x': np.array([0.5], np.float32)}, state,
                               params)
    moves.append(-float(updates['x'][0]))
  # Adam with a constant gradient moves by the learning rate
  np.testing.assert_allclose(moves, [.0025, .005, .0075, .01, .01, .01],
                             rtol=1e-4)


def test_batch_stream_is_a_function_of_its_position():
  stream = [batches.permutation(10, 3, i, 4) for i in range(5)]
  flat = sum(stream, [])
  assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
  assert flat[:10] != flat[10:]
  assert batches.permutation(10, 3, 3, 4) == stream[3]
