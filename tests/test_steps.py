"""Update steps: golden numbers, micro-batches, devices, shardings."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from exectune_jax.config import default_config
from exectune_jax.episode import Episode, Problem, Reward, Strategy
from exectune_jax.errors import UserError
from exectune_jax.learning import batches, sharding, steps
from exectune_jax.models import tokenizer
from exectune_jax.models.guide import Guide
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_variables)
from exectune_jax.stages import rl

SLOTS = 6


def one_update(kind: str, micro_batch: int = 0, mesh_sizes=(-1, 1, 1),
               change=lambda batch: None, kl=0.0, mode='pjit', remat='none',
               row_length=0, lora=0, repeat=1):
  """Loss, gradient norm and a fingerprint of the updated parameters."""
  config = default_config()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh_sizes
  mesh = sharding.make_mesh(config.mesh)
  model = Transformer(TransformerConfig(
      vocab=16, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48,
      remat=remat, lora_rank=lora, lora_targets='[qo]'),
      mesh if mode == 'pjit' else None)
  tx = steps.optimizer(config.optim, 1e-2, 1)
  shapes, where = steps.state_shardings(model, tx, mesh)
  rng = np.random.default_rng(0)
  # weights from numpy, so that the numbers below hold on any JAX version
  def draw(path, leaf):
    if 'scale' in jax.tree_util.keystr(path):
      return np.ones(leaf.shape, np.float32)
    return rng.normal(0, 0.3, leaf.shape).astype(np.float32)
  params = jax.tree_util.tree_map_with_path(draw, shapes.variables['params'])
  variables = {'params': params}
  if lora:
    variables['lora'] = jax.tree_util.tree_map_with_path(
        draw, shapes.variables['lora'])
  state = steps.new_state(jax.device_put(
      variables, {**where.frozen, **where.params}), tx, where)
  batch = make_batch(rng, kind, kl, row_length)
  change(batch)
  if kind == 'sft':
    step = steps.sft_step(model, tx, micro_batch)
  else:
    step = steps.grpo_step(model, tx, clip_low=0.2, clip_high=0.28,
                           tis_cap=2.0, temperature=0.9, kl=kl,
                           micro_batch=micro_batch)
  compiled = steps.compile_step(step, mesh, where, mode)
  for _ in range(repeat):
    state, metrics = compiled(state, jax.device_put(batch,
                                                    sharding.rows(mesh)))
  leaves = jax.device_get(jax.tree.leaves(state.params))
  return [float(metrics['loss']), float(metrics['grad_norm']),
          *[float(np.abs(x).sum()) for x in leaves]]


def make_batch(rng, kind, kl, row_length):
  """Eight texts, one a row, or packed into eight rows of row_length."""
  lengths = rng.integers(1, SLOTS + 1, 8)
  blocks = [batches.Block(p, [c]) for p, c in zip(
      [rng.integers(0, 16, n).tolist() for n in rng.integers(1, 9, 8)],
      [rng.integers(0, 16, n).tolist() for n in lengths], strict=True)]
  rows = [[i] for i in range(8)]
  if row_length:
    rows = batches.PackedStream([b.length for b in blocks], row_length,
                                0).rows(0, 8)
    used = [i for row in rows for i in row]
    first_epoch = used[:8]
    assert sorted(first_epoch) == list(range(8))
    rows = [[i for k, i in enumerate(row) if sum(map(len, rows[:r])) + k < 8]
            for r, row in enumerate(rows)]
    assert max(len(row) for row in rows) > 1
  batch = batches.lay_out([[blocks[i] for i in row] for row in rows],
                          row_length)
  if kind == 'sft':
    return batch
  T = batch['mask_BT'].shape[1]
  def place(values_BT):
    return batches.lay_slots([[values_BT[i][:lengths[i]] for i in row]
                              for row in rows], T)
  batch['sampler_logp_BT'] = place(rng.normal(-2.5, 0.5, (8, SLOTS)).astype(
      np.float32))
  batch['advantage_BT'] = place(np.repeat(rng.normal(0, 1, 8).astype(
      np.float32)[:, None], SLOTS, 1))
  batch['mask_BT'] = place(np.repeat(np.array(
      [1, 1, 1, 0, 1, 1, 1, 1], np.float32)[:, None], SLOTS, 1))
  if kl:
    batch['reference_logp_BT'] = place(rng.normal(
        -2.5, 0.5, (8, SLOTS)).astype(np.float32))
  return batch


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


@pytest.mark.parametrize('kind', ['sft', 'grpo'])
def test_packed_rows_give_the_update_of_padded_ones(kind):
  packed = one_update(kind, kl=0.5 * (kind == 'grpo'), row_length=32)
  padded = one_update(kind, kl=0.5 * (kind == 'grpo'))
  np.testing.assert_allclose(packed, padded, rtol=1e-5)


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_policies_change_no_number(remat):
  np.testing.assert_allclose(one_update('grpo', remat=remat),
                             one_update('grpo'), rtol=1e-5)


def test_a_shared_prompt_gives_the_update_of_one_per_member():
  """Three groups of four, through the batch that the RL stage makes."""
  config = default_config()
  words = tokenizer.build()
  model = Transformer(TransformerConfig(
      vocab=len(words), dim=32, layers=2, heads=4, kv_heads=2, head_dim=8,
      mlp_dim=48))
  guide = Guide(model, words, 128, SLOTS)
  rng = np.random.default_rng(0)
  groups = []
  for g, question in enumerate(('2 apples and 3 pears?', 'Why?', '7 * 8?')):
    problem = Problem(str(g), question, '')
    groups.append([Episode(
        problem, g, i, 0, Strategy(
            '', 'x', '', tuple(rng.integers(2, 99, n)),
            tuple(rng.normal(-3, 1, n))),
        reward=None if lost else Reward(rng.normal(), {}))
        for i, (n, lost) in enumerate(zip(
            rng.integers(1, SLOTS + 1, 4), (0, 0, g == 1, 0), strict=True))])
  mesh = sharding.make_mesh(config.mesh)
  tx = steps.optimizer(config.optim, 1e-2, 1)
  _, where = steps.state_shardings(model, tx, mesh)
  step = steps.compile_step(steps.grpo_step(
      model, tx, clip_low=0.2, clip_high=0.28, tis_cap=2.0, temperature=1.0),
      mesh, where)
  found, size = [], []
  known = [[e for e in group if e.reward] for group in groups]
  assert len(known[1]) == 3
  for share, members in ((True, groups), (False, groups), (True, known)):
    config.rl.share_prompt = share
    state = steps.new_state(jax.jit(lambda key: init_variables(model, key))(
        jax.random.key(0)), tx, where)
    batch = rl.make_batch(members, guide, config.rl)
    size.append((batch['segments_BL'] > 0).sum())
    state, metrics = step(state, jax.device_put(batch, sharding.rows(mesh)))
    found.append([*map(float, (metrics['loss'], metrics['grad_norm'],
                               metrics['tokens'], metrics['neg_logp'])),
                  *[float(np.abs(x).sum())
                    for x in jax.device_get(jax.tree.leaves(state.params))]])
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
  # A lost member leaves the update as if it had never been.
  np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
  prompts = [len(guide.prompt(group[0].problem)) for group in groups]
  assert size[1] - size[0] == 3 * sum(prompts)  # computed once, not four times


def test_adapters_train_alone_and_start_from_the_same_loss():
  """With B = 0 the adapted model is the plain one; W never moves."""
  config = default_config()
  mesh = sharding.make_mesh(config.mesh)
  tx = steps.optimizer(config.optim, 1e-2, 1)
  losses, kept = [], []
  for rank in (0, 4):
    model = Transformer(TransformerConfig(
        vocab=16, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8,
        mlp_dim=48, lora_rank=rank, lora_targets='q|down'))
    _, where = steps.state_shardings(model, tx, mesh)
    # the same weights: adapters draw from the same key after them
    unadapted = Transformer(dataclasses.replace(model.config, lora_rank=0))
    plain = jax.jit(lambda key, m=unadapted: init_variables(m, key))(
        jax.random.key(0))
    variables = {**jax.jit(lambda key, m=model: init_variables(m, key))(
        jax.random.key(1)), **plain}
    state = steps.new_state(variables, tx, where)
    batch = make_batch(np.random.default_rng(0), 'sft', 0, 0)
    step = steps.compile_step(steps.sft_step(model, tx), mesh, where)
    before = jax.device_get(state.variables['params'])
    for _ in range(3):
      state, metrics = step(state, jax.device_put(batch, sharding.rows(mesh)))
      losses.append(float(metrics['loss']))
    kept.append(jax.tree.map(np.array_equal, before,
                             jax.device_get(state.variables['params'])))
  assert losses[3] == pytest.approx(losses[0], rel=1e-6)
  assert losses[5] < losses[4] < losses[3]
  assert all(jax.tree.leaves(kept[1])) and not any(jax.tree.leaves(kept[0]))
  # 2 layers of q: 32 x 4 + 4 x 32, and of down: 48 x 4 + 4 x 32
  assert sum(x.size for x in jax.tree.leaves(state.params)) == 2 * (
      256 + 320)
  assert sorted(state.params['lora']['blocks']) == ['down', 'q']


_EIGHT = """
import json, sys
sys.path.insert(0, 'tests')
from test_steps import one_update
print(json.dumps([one_update(k, m, s, **more) for k, m, s, more in [
    ('sft', 0, (8, 1, 1), {}), ('grpo', 0, (2, 2, 2), {}),
    ('grpo', 4, (1, 4, 2), {}), ('grpo', 0, (8, 1, 1), {'mode': 'pmap'}),
    ('sft', 0, (-1, 1, 1), {'mode': 'pmap', 'repeat': 3}),
    ('grpo', 0, (2, 2, 2), {'lora': 4})]]))
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
  sft, grpo, micro, pmapped, thrice, lora = json.loads(done.stdout)
  np.testing.assert_allclose(sft, one_update('sft'), rtol=1e-5)
  for found in (grpo, micro, pmapped):
    np.testing.assert_allclose(found, one_update('grpo'), rtol=1e-5)
  np.testing.assert_allclose(thrice, one_update('sft', repeat=3), rtol=1e-4)
  np.testing.assert_allclose(lora, one_update('grpo', lora=4), rtol=1e-5)


def test_an_invalid_row_takes_no_part():
  """Row 3 has valid_B = 0: other tokens and advantage, same update."""
  def change(batch):
    batch['tokens_BL'][3] = 15 - batch['tokens_BL'][3]
    batch['advantage_BT'][3] = 1e3
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
  for extra in ({}, dict(tied=False, qk_norm=True, qkv_bias=True,
                         post_norms=True, lora_rank=2)):
    model = Transformer(TransformerConfig(
        vocab=16, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8,
        mlp_dim=48, **extra))
    shapes = jax.eval_shape(
        lambda m=model: init_variables(m, jax.random.key(0)))
    assert len(jax.tree.leaves(sharding.shardings(shapes, mesh))) == len(
        jax.tree.leaves(shapes))
  with pytest.raises(ValueError, match='no sharding rule'):
    sharding.shardings({'mystery': np.zeros((2, 2))}, mesh)
  config.mesh.fsdp = 3
  with pytest.raises(UserError, match=r'mesh=\(-1, 3, 1\)'):
    sharding.make_mesh(config.mesh)


def test_a_row_of_a_batch_lies_in_one_process():
  """Four processes with two devices, as the mesh (data 2, fsdp 1, tensor 4)
  or (4, 1, 2)."""
  process = np.repeat(np.arange(4), 2)
  sharding._check_owners(process.reshape(4, 1, 2))
  with pytest.raises(UserError, match='mesh.tensor=4.* has 2 devices'):
    sharding._check_owners(process.reshape(2, 1, 4))


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
