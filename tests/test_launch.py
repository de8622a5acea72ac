"""Launch scripts: usage, and GGUF to Hugging Face with exact weights."""

import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import tiny_checkpoints
import yaml
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


def _sky():
  return yaml.safe_load((ROOT / 'launch/sky.yaml').read_text())


def test_skypilot_takes_the_job():
  sky = pytest.importorskip('sky')
  task = sky.Task.from_yaml_config(
      _sky(), env_overrides=[('WORKDIR', 'gs://bucket/x')])
  assert {next(iter(r.accelerators)) for r in task.resources} == {
      'tpu-v6e-8', 'tpu-v5litepod-8', 'H100', 'A100-80GB'}
  assert all(r.use_spot for r in task.resources)


@pytest.mark.parametrize('gpu', [False, True])
def test_the_job_runs_main_with_its_words(tmp_path, gpu):
  """What SkyPilot would run on a machine, with a Python that only prints."""
  for name, text in (('.venv/bin/python', 'printf "%s\\n" "$@"; env'),
                     ('bin/nvidia-smi', f'exit {0 if gpu else 9}')):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/bash\n{text}\n')
    path.chmod(0o755)
  env = {'WORKDIR': 'gs://b/a run', 'CONFIG': 'configs/gsm8k.py',
         'ARGS': '--config.seed=1 --config.budget_usd=2', 'OPENAI_API_KEY': '',
         'GEMINI_API_KEY': 'k', 'ANTHROPIC_API_KEY': '', 'HF_TOKEN': '',
         'EXECTUNE_CORE_API_KEY': '', 'SKYPILOT_NUM_NODES': '2',
         'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'SKYPILOT_NODE_RANK': '1',
         'PATH': f'{tmp_path}/bin:/usr/bin:/bin'}
  done = subprocess.run(['bash', '-c', _sky()['run']], cwd=tmp_path, env=env,
                        text=True, capture_output=True)
  lines = done.stdout.splitlines()
  assert lines[:9] == [
      '-m', 'exectune_jax.main', '--config', 'configs/gsm8k.py', '--workdir',
      'gs://b/a run', f'--config.mesh.hosts={2 if gpu else 0}',
      '--config.seed=1', '--config.budget_usd=2'], done.stderr
  names = {x.partition('=')[0] for x in lines[9:]}
  assert 'GEMINI_API_KEY' in names and 'OPENAI_API_KEY' not in names
  assert ('JAX_COORDINATOR_ADDRESS=10.0.0.1:12355' in lines) == gpu
  assert ('JAX_PROCESS_ID=1' in lines) == gpu
  if shutil.which('shellcheck'):
    for block in ('setup', 'run'):  # ARGS is split on purpose
      subprocess.run(['shellcheck', '-s', 'bash', '-e', 'SC2086,SC2155', '-'],
                     input=_sky()[block], text=True, check=True)


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
