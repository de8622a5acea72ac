import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_llama

from exectune_jax.errors import UserError
from exectune_jax.models import hf, zoo
from exectune_jax.models.transformer import (DecodeView, Transformer,
                                             TransformerConfig, init_params)

GOLDEN = json.loads((pathlib.Path(__file__).parent
                     / 'golden/llama_logits.json').read_text())
CASES = [(True, 2), (False, 4), (False, 1)]


def logits_of(folder):
  config = hf.read_config(folder)
  params = hf.read_params(folder, config)
  return np.asarray(_forward(Transformer(config), params))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params):
  hidden, _ = model.apply({'params': params}, jnp.array(tiny_llama.PROMPT))
  return model.apply({'params': params}, hidden, method='logits')


@pytest.mark.parametrize('tied, kv', CASES)
@pytest.mark.parametrize('sharded, old', [(False, False), (True, True)])
def test_logits_equal_the_golden_ones_of_torch(tmp_path, tied, kv, sharded,
                                               old):
  """tiny_llama.py made the numbers; remake them only if it changes."""
  folder = tiny_llama.write(tmp_path / 'm', tied, kv, sharded, old_fields=old)
  found = logits_of(folder)
  found = np.stack([found[0, 7], found[1, 3], found[0, 3]])
  np.testing.assert_allclose(found, GOLDEN[f'tied={tied},kv={kv}'], atol=1e-4)


@pytest.mark.parametrize('tied, kv', CASES)
def test_logits_equal_torch_live(tmp_path, tied, kv):
  pytest.importorskip('torch')
  folder = tiny_llama.write(tmp_path / 'm', tied, kv)
  ours, theirs = logits_of(folder), tiny_llama.torch_logits(folder)
  for row, length in enumerate(tiny_llama.LENGTHS):
    np.testing.assert_allclose(ours[row, :length], theirs[row, :length],
                               atol=1e-4)


def test_bfloat16_checkpoints_are_read(tmp_path):
  wide = tiny_llama.write(tmp_path / 'a', True, 2)
  narrow = tiny_llama.write(tmp_path / 'b', True, 2, dtype=ml_dtypes.bfloat16)
  config = hf.read_config(narrow)
  a, b = (hf.read_params(f, config)['blocks']['q']['kernel']
          for f in (wide, narrow))
  assert b.dtype == np.float32
  np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16), b)


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_float32_in_a_bfloat16_model(tied):
  config = TransformerConfig(vocab=50, dim=32, layers=1, heads=4, kv_heads=2,
                             head_dim=8, mlp_dim=48, tied=tied,
                             dtype='bfloat16')
  model = Transformer(config)
  params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
  hidden = jax.random.normal(jax.random.key(1), (3, 32)).astype(jnp.bfloat16)
  logits = np.asarray(model.apply({'params': params}, hidden, method='logits'))
  table = np.asarray(params['embed']['embedding'] if tied
                     else params['head']['kernel'].T)
  exact = np.asarray(hidden, np.float32) @ table.astype(
      ml_dtypes.bfloat16).astype(np.float32).T
  np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def _break(folder, change):
  from safetensors.numpy import load_file, save_file
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')


def test_broken_checkpoints_name_the_tensor(tmp_path):
  folder = tiny_llama.write(tmp_path / 'm', True, 2)
  config = hf.read_config(folder)
  name = 'model.layers.1.mlp.up_proj.weight'
  _break(folder, lambda t: t.update({name: t[name][:5].copy()}))
  with pytest.raises(UserError, match=r"up_proj.weight' has shape \(5, 32\), "
                     r'config.json says \(48, 32\)'):
    hf.read_params(folder, config)
  _break(folder, lambda t: t.pop(name))
  with pytest.raises(UserError, match="up_proj.weight' is missing"):
    hf.read_params(folder, config)
  (folder / 'model.safetensors').write_bytes(b'garbage')
  with pytest.raises(UserError, match='not a readable safetensors'):
    hf.read_params(folder, config)


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'mamba'}, "model_type='mamba'"),
    ({'rope_parameters': {'rope_type': 'llama3'}}, "rope_type='llama3'"),
    ({'attention_bias': True}, 'biases')])
def test_foreign_architectures_are_refused(tmp_path, change, message):
  folder = tiny_llama.write(tmp_path / 'm', True, 2)
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**config, **change}))
  with pytest.raises(UserError, match=message):
    hf.read_config(folder)


def test_missing_directory_names_the_field(tmp_path):
  with pytest.raises(UserError, match='guide.checkpoint='):
    hf.read_config(tmp_path / 'nowhere')


VARIANTS = {
    'llama': {}, 'untied': dict(tied=False),
    'qwen': dict(qk_norm=True, qkv_bias=True),
    'gemma': dict(scale_embeddings=True, norm_plus_one=True,
                  activation='gelu'),
    'remat': dict(remat=True)}


@pytest.mark.parametrize('variant', VARIANTS)
def test_cached_decode_equals_the_full_pass(variant):
  """Two prompts of different length, three samples each, five new tokens."""
  config = TransformerConfig(vocab=50, dim=32, layers=2, heads=4, kv_heads=2,
                             head_dim=8, mlp_dim=48, **VARIANTS[variant])
  model = Transformer(config)
  params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
  # norms and biases away from their trivial start
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(
      jax.random.key(1), x.shape), params)
  rng = np.random.default_rng(0)
  lengths, G, T = [6, 3], 3, 5
  prompts = np.zeros((2, 6), np.int32)
  for row, n in enumerate(lengths):
    prompts[row, :n] = rng.integers(0, 50, n)
  new = rng.integers(0, 50, (2, G, T)).astype(np.int32)
  full = jax.jit(lambda tokens: model.apply({'params': params}, tokens))
  step = jax.jit(lambda *args: model.apply({'params': params}, *args,
                                           method='decode'))
  _, prompt_kv = full(jnp.array(prompts))
  # every sample as one row of prompt and new tokens, for the full pass
  rows = np.zeros((2, G, 6 + T), np.int32)
  for row, n in enumerate(lengths):
    rows[row, :, :n] = prompts[row, :n]
    rows[row, :, n:n + T] = new[row]
  expected, _ = full(jnp.array(rows.reshape(2 * G, 6 + T)))
  expected = np.asarray(expected).reshape(2, G, 6 + T, 32)
  kv = tuple(jnp.zeros((2, 2, G, T, 2, 8)) for _ in range(2))
  for t in range(T):
    hidden, kv = step(new[:, :, t], prompt_kv, kv,
                      DecodeView(jnp.array(lengths), jnp.array(t)))
    for row, n in enumerate(lengths):
      np.testing.assert_allclose(hidden[row], expected[row, :, n + t],
                                 atol=2e-5)


SMOLLM2 = TransformerConfig(vocab=49_152, dim=576, layers=30, heads=9,
                            kv_heads=3, head_dim=64, mlp_dim=1536)


@pytest.mark.parametrize('config, count', [
    (SMOLLM2, 134_515_008),  # as published
    # 1000 * 128 + 128 + 3 * (2 * 128 + 128 * 128 * 2 + 128 * 64 * 2
    #                         + 3 * 128 * 384)
    (zoo.architecture('tiny', vocab=1000), 718_720)])
def test_parameter_counts(config, count):
  model = Transformer(config)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_every_size_is_counted():
  assert set(zoo.SIZES) == {'tiny'}, 'add the new size to the counts above'
  with pytest.raises(UserError, match="guide.size='huge'"):
    zoo.architecture('huge')
