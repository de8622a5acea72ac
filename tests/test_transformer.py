"""The decoder against transformers on torch, and checkpoints both ways."""

import dataclasses
import functools
import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints
from safetensors.numpy import load_file, save_file

from exectune_jax.config import default_config
from exectune_jax.errors import UserError
from exectune_jax.learning import sharding
from exectune_jax.models import attention, hf, zoo
from exectune_jax.models.attention import DecodeView
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_variables)

GOLDEN = json.loads((pathlib.Path(__file__).parent
                     / 'golden/logits.json').read_text())
PROMPT, LENGTHS = tiny_checkpoints.PROMPT, tiny_checkpoints.LENGTHS
FAMILIES = list(tiny_checkpoints.FAMILIES)


def read(folder, **changes):
  """(model, variables) of a checkpoint, on one device."""
  config = hf.read_config(folder, **changes)
  model = Transformer(config)
  shapes = jax.eval_shape(
      lambda: init_variables(model, jax.random.key(0)))['params']
  where = sharding.shardings(shapes, sharding.make_mesh(default_config().mesh))
  with jax.transfer_guard('disallow'):  # as in a run
    return model, {'params': hf.read_params(folder, config, shapes, where)}


def logits_of(folder):
  return np.asarray(_forward(*read(folder)))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, variables):
  hidden, _ = model.apply(variables, jnp.array(PROMPT))
  return model.apply(variables, hidden, method='logits')


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('sharded, old', [(False, False), (True, True)])
def test_logits_equal_the_golden_ones_of_torch(tmp_path, family, sharded, old):
  """tiny_checkpoints.py made them; remake them only if it changes."""
  folder = tiny_checkpoints.write(tmp_path / 'm', family, sharded,
                                  old_fields=old)
  np.testing.assert_allclose(tiny_checkpoints.chosen(logits_of(folder)),
                             GOLDEN[family], atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_equal_torch_live_both_ways(tmp_path, family):
  """Theirs read by us, and what we write read by them."""
  pytest.importorskip('torch')
  folder = tiny_checkpoints.write(tmp_path / 'm', family)
  model, variables = read(folder)
  ours = np.asarray(_forward(model, variables))
  hf.write(tmp_path / 'out', model.config, variables['params'], 'float32', {})
  for theirs in map(tiny_checkpoints.torch_logits, (folder, tmp_path / 'out')):
    for row, length in enumerate(LENGTHS):
      np.testing.assert_allclose(ours[row, :length], theirs[row, :length],
                                 atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_written_checkpoints_hold_the_same_bytes(tmp_path, family,
                                                 monkeypatch):
  """bfloat16 in, bfloat16 out, in several files: the very same tensors."""
  monkeypatch.setattr(hf, 'FILE_BYTES', 20_000)
  source = tiny_checkpoints.write(tmp_path / 'm', family,
                                  dtype=ml_dtypes.bfloat16)
  model, variables = read(source)
  hf.write(tmp_path / 'out', model.config, variables['params'], 'bfloat16', {})
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  assert len(files) > 1
  index = json.loads((tmp_path / 'out/model.safetensors.index.json'
                      ).read_text())['weight_map']
  found = {}
  for file in files:
    assert file.stat().st_size < 30_000
    part = load_file(file)
    assert all(index[name] == file.name for name in part)
    found |= part
  expected = load_file(source / 'model.safetensors')
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert found[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found[name], value)
  assert hf.read_config(tmp_path / 'out') == model.config


def test_reading_keeps_one_parameter_on_the_host(tmp_path):
  """Peak of what numpy holds while 25 MB in 7 stacked kernels are read."""
  config = TransformerConfig(vocab=200, dim=128, layers=24, heads=4,
                             kv_heads=4, head_dim=32, mlp_dim=512)
  model = Transformer(config)
  make = functools.partial(init_variables, model)
  variables = jax.jit(make)(jax.random.key(0))
  hf.write(tmp_path / 'm', config, variables['params'], 'float32', {})
  shapes = jax.eval_shape(make, jax.random.key(0))['params']
  where = sharding.shardings(shapes, sharding.make_mesh(default_config().mesh))
  largest = max(x.size * 4 for x in jax.tree.leaves(shapes))
  total = sum(x.size * 4 for x in jax.tree.leaves(shapes))
  assert largest == 24 * 128 * 512 * 4 and total > 3.9 * largest
  tracemalloc.start()
  params = hf.read_params(tmp_path / 'm', config, shapes, where)
  held, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # A CPU device may take over numpy's memory as it is: that is not ours.
  assert peak - held < 1.3 * largest
  jax.tree.map(np.testing.assert_array_equal, params, variables['params'])


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_float32_in_a_bfloat16_model(tied):
  config = TransformerConfig(vocab=50, dim=32, layers=1, heads=4, kv_heads=2,
                             head_dim=8, mlp_dim=48, tied=tied,
                             dtype='bfloat16')
  model = Transformer(config)
  variables = jax.jit(lambda key: init_variables(model, key))(
      jax.random.key(0))
  params = variables['params']
  hidden = jax.random.normal(jax.random.key(1), (3, 32)).astype(jnp.bfloat16)
  logits = np.asarray(model.apply(variables, hidden, method='logits'))
  table = np.asarray(params['embed']['embedding'] if tied
                     else params['head']['kernel'].T)
  exact = np.asarray(hidden, np.float32) @ table.astype(
      ml_dtypes.bfloat16).astype(np.float32).T
  np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def _break(folder, change):
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')


def test_broken_checkpoints_name_the_tensor(tmp_path):
  folder = tiny_checkpoints.write(tmp_path / 'm')
  name = 'model.layers.1.mlp.up_proj.weight'
  _break(folder, lambda t: t.update({name: t[name][:5].copy()}))
  with pytest.raises(UserError, match=r"up_proj.weight' has shape \(5, 32\), "
                     r'config.json says \(48, 32\)'):
    read(folder)
  _break(folder, lambda t: t.pop(name))
  with pytest.raises(UserError, match="up_proj.weight' is missing"):
    read(folder)
  (folder / 'model.safetensors').write_bytes(b'garbage')
  with pytest.raises(UserError, match='not a readable safetensors'):
    read(folder)


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'mamba'}, "model_type='mamba'"),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_type='yarn'"),
    ({'attention_bias': True}, 'attention_bias')])
def test_foreign_architectures_are_refused(tmp_path, change, message):
  folder = tiny_checkpoints.write(tmp_path / 'm')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**config, **change}))
  with pytest.raises(UserError, match=message):
    hf.read_config(folder)


def test_missing_directory_names_the_field(tmp_path):
  with pytest.raises(UserError, match='guide.checkpoint='):
    hf.read_config(tmp_path / 'nowhere')


@pytest.mark.parametrize('family', [*FAMILIES, 'remat'])
def test_cached_decode_equals_the_full_pass(tmp_path, family):
  """Two prompts of different length, three samples each, five new tokens in
  a ring of six that starts in its middle; the second prompt two steps late.
  """
  changes = {'remat': 'full'} if family == 'remat' else {}
  model, variables = read(tiny_checkpoints.write(
      tmp_path / 'm', 'llama' if family == 'remat' else family), **changes)
  c = model.config
  rng = np.random.default_rng(0)
  lengths, late, G, T, ring = np.array([6, 3]), np.array([0, 2]), 3, 5, 6
  prompts = np.zeros((2, 6), np.int32)
  for row, n in enumerate(lengths):
    prompts[row, :n] = rng.integers(0, 50, n)
  new = rng.integers(0, 50, (2, G, T)).astype(np.int32)
  full = jax.jit(lambda tokens: model.apply(variables, tokens))
  step = jax.jit(lambda *args: model.apply(variables, *args, method='decode'))
  _, prompt_kv = full(jnp.array(prompts))
  # every sample as one row of prompt and new tokens, for the full pass
  rows = np.zeros((2, G, 6 + T), np.int32)
  for row, n in enumerate(lengths):
    rows[row, :, :n] = prompts[row, :n]
    rows[row, :, n:n + T] = new[row]
  expected, _ = full(jnp.array(rows.reshape(2 * G, 6 + T)))
  expected = np.asarray(expected).reshape(2, G, 6 + T, c.dim)
  shape = (c.layers, 2, G, ring, c.kv_heads, c.head_dim)
  kv = (jnp.zeros(shape), jnp.zeros(shape))
  compared = 0
  for t in range(T + 2):
    age = np.clip(t - late, 0, T - 1)
    fed = new[np.arange(2), :, age]
    hidden, kv = step(fed, prompt_kv, kv, DecodeView(
        jnp.array(lengths), jnp.array(age), jnp.array((3 + t) % ring), G))
    for row, n in enumerate(lengths):
      if 0 <= t - late[row] < T:
        compared += 1
        np.testing.assert_allclose(
            hidden[row], expected[row, :, n + age[row]], atol=3e-5)
  assert compared == 2 * T


def test_int8_rounds_to_127_steps_of_the_largest():
  x = jnp.array([[1.0, -0.5, 0.003], [0.0, 0.0, 0.0]])
  steps, scale = attention.store(x, True)
  assert steps.tolist() == [[127, -64, 0], [0, 0, 0]]
  np.testing.assert_allclose(attention.load((steps, scale), jnp.float32),
                             [[1.0, -64 / 127, 0], [0, 0, 0]], atol=1e-6)


COUNTS = {  # as published, or by hand for tiny:
    # 1000 * 128 + 128 + 3 * (2 * 128 + 128 * 128 * 2 + 128 * 64 * 2
    #                         + 3 * 128 * 384)
    'tiny': 718_720,
    'smollm2_135m': 134_515_008, 'smollm2_360m': 361_821_120,
    'smollm2_1p7b': 1_711_376_384,
    'qwen2p5_0p5b': 494_032_768, 'qwen2p5_1p5b': 1_543_714_304,
    'qwen2p5_3b': 3_085_938_688, 'qwen2p5_7b': 7_615_616_512,
    'qwen3_0p6b': 596_049_920, 'qwen3_1p7b': 1_720_574_976,
    'qwen3_4b': 4_022_468_096, 'qwen3_8b': 8_190_735_360,
    'llama3p2_1b': 1_235_814_400, 'llama3p2_3b': 3_212_749_824,
    'llama3p1_8b': 8_030_261_248,
    'gemma3_270m': 268_098_176, 'gemma3_1b': 999_885_952,
    'gemma3_4b': 3_880_263_168}  # 4_300_079_472 with its vision tower


@pytest.mark.parametrize('size', zoo.SIZES)
def test_parameter_counts(size):
  """A size that is registered but not counted here fails."""
  config = zoo.architecture(size, **({'vocab': 1000} if size == 'tiny' else {}))
  model = Transformer(config)
  shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == COUNTS[size]


@pytest.mark.parametrize('size', sorted(set(zoo.SIZES) - {'tiny'}))
def test_named_sizes_survive_their_own_config_json(size, tmp_path):
  config = zoo.architecture(size)
  (tmp_path / 'config.json').write_text(json.dumps(hf.config_json(config)))
  found = hf.read_config(tmp_path)
  # Gemma 3 states its query scale, which is the default one
  assert found.scale == pytest.approx(config.scale)
  assert dataclasses.replace(found, query_scale=0.0) == config


def test_unknown_sizes_are_named():
  with pytest.raises(UserError, match="guide.size='huge'"):
    zoo.architecture('huge')
