"""Launch scripts: usage, and GGUF to Hugging Face with exact weights."""

import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import tiny_checkpoints
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))

gguf = pytest.importorskip('gguf', reason="needs the extra 'local'")


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_strict_and_shellcheck_clean(path):
  assert 'set -euo pipefail' in path.read_text()
  subprocess.run(['bash', '-n', path], check=True)
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', path], check=True)


def test_usage_is_exit_code_two(tmp_path):
  done = subprocess.run([ROOT / 'launch/local_core.sh'], text=True,
                        capture_output=True)
  assert done.returncode == 2 and 'local_core.sh start' in done.stdout
  done = subprocess.run([ROOT / 'launch/local_core.sh', 'status'], text=True,
                        capture_output=True,
                        env={'PATH': '/usr/bin:/bin', 'STATE': str(tmp_path)})
  assert done.returncode == 1 and done.stderr == 'error: not running\n'


def _interleave(weights, heads):
  """The row order of llama.cpp: rotary pairs side by side."""
  rows, columns = weights.shape
  return (weights.reshape(heads, 2, rows // heads // 2, columns)
          .swapaxes(1, 2).reshape(rows, columns))


def _write_gguf(path, tensors, config):
  from launch.gguf_model import _LAYER, _TOP
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_embedding_length(config['hidden_size'])
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  writer.add_context_length(64)
  writer.add_rope_freq_base(5000.0)
  alphabet = [chr(c) for c in range(39, 99)]
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(['<|end|>', '<|im_start|>', *alphabet, 'ab', 'Ġ'])
  writer.add_token_types([3, 3, *[1] * 62])
  writer.add_token_merges(['a b'])
  writer.add_eos_token_id(0)
  writer.add_bos_token_id(1)
  writer.add_chat_template('{{ messages[0].content }}')
  names = {v: k for k, v in _TOP.items()}
  for i in range(config['num_hidden_layers']):
    names |= {f'model.layers.{i}.{hf}.weight': f'blk.{i}.{ours}.weight'
              for ours, hf in _LAYER.items()}
  for name, weights in tensors.items():
    heads = {'q_proj': config['num_attention_heads'],
             'k_proj': config['num_key_value_heads']}.get(name.split('.')[-2])
    if heads:
      weights = _interleave(weights, heads)
    writer.add_tensor(names[name], np.ascontiguousarray(weights))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_gguf_becomes_a_guide_directory_with_the_same_weights(tmp_path):
  from exectune_jax.models import hf, tokenizer
  from launch import gguf_model
  source = tiny_checkpoints.write(tmp_path / 'hf')
  tensors = load_file(source / 'model.safetensors')
  config = json.loads((source / 'config.json').read_text())
  _write_gguf(tmp_path / 'm.gguf', tensors, config)
  gguf_model.guide(str(tmp_path / 'm.gguf'), str(tmp_path / 'out'))
  found = load_file(tmp_path / 'out' / 'model.safetensors')
  assert set(found) == set(tensors)
  for name, weights in tensors.items():
    np.testing.assert_array_equal(found[name], weights)
  ours, theirs = hf.read_config(tmp_path / 'out'), hf.read_config(source)
  assert ours.norm_eps == pytest.approx(theirs.norm_eps)
  assert (ours.rope_theta, ours.tied, ours.vocab) == (5000.0, True, 64)
  words = tokenizer.load(tmp_path / 'out')
  assert words.eos_token_id == 0
  # single digits, and the merge
  assert words.tokenize('12Aab') == ['1', '2', 'A', 'ab']
