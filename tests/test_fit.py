"""Whether a config fits a TPU, asked on a machine that has none."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from exectune_jax import roofline
from exectune_jax.config import default_config
from exectune_jax.learning import losses
from exectune_jax.models import zoo
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_variables)

ROOT = pathlib.Path(__file__).parents[1]


def fit(*args, config='configs/quickstart.py', topology='v5e:2x4'):
  env = {k: v for k, v in os.environ.items() if k not in (
      'XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')}
  return subprocess.run(
      [sys.executable, '-m', 'exectune_jax.fit', f'--config={config}',
       f'--topology={topology}', *args], cwd=ROOT, text=True, env=env,
      capture_output=True, timeout=900)


@pytest.fixture
def libtpu():
  pytest.importorskip('libtpu')


SMALL = dict(vocab=512, dim=64, layers=1, heads=4, kv_heads=2, head_dim=16,
             mlp_dim=128)


def test_operations_agree_with_the_compiler_where_no_loop_is():
  """One layer, one chunk of logits: XLA counts every operation once."""
  c = TransformerConfig(**SMALL)
  model = Transformer(c)
  variables = jax.jit(lambda key: init_variables(model, key))(
      jax.random.key(0))
  rows, length = 4, 128
  ints = jnp.zeros((rows, length), jnp.int32)
  batch = {'tokens_BL': ints, 'positions_BL': ints, 'segments_BL': ints,
           'where_BT': ints, 'target_BT': ints,
           'mask_BT': jnp.ones((rows, length))}
  def loss(v):
    return -jnp.sum(losses.completion_logprobs(model, v, batch))
  forward = jax.jit(loss).lower(variables).compile().cost_analysis()['flops']
  ours = (roofline.forward_flops(c, rows, length)
          + roofline.head_flops(c, rows * length))
  assert forward == pytest.approx(ours, rel=0.1)
  both = jax.jit(jax.grad(loss)).lower(variables).compile().cost_analysis()
  step = roofline.train_step(c, rows, length, length, 1, chips=1, fsdp=1,
                             tensor=1, trained=0)
  assert both['flops'] == pytest.approx(step.flops, rel=0.1)


def test_costs_by_hand():
  """SMALL: 64 * 16 * (8 + 4) + 3 * 64 * 128 = 36,864 weights a layer."""
  c = TransformerConfig(**SMALL, dtype='bfloat16')
  assert roofline.layer_weights(c) == 36_864
  cost = roofline.decode_token(c, 3, 5, 100, 20, False, chips=2, fsdp=1,
                               tensor=1)
  # 15 samples: products, head, scores and values over 120 tokens
  assert cost.flops == (2 * 36_864 * 15 + 2 * 64 * 512 * 15
                        + 4 * 4 * 16 * 15 * 120) / 2
  # weights once per chip; caches: 3 prompts of 100 and 15 times 20 tokens,
  # key and value, 2 heads of 16, 2 bytes
  assert cost.bytes == 2 * (36_864 + 64 * 512) + (
      2 * 2 * 16 * 2 * (300 + 300)) / 2
  chip = roofline.Chip(flops=10.0, memory=0, bandwidth=4.0, links=2.0,
                       usd_per_hour=1.0)
  assert roofline.Cost(20.0, 4.0, 2.0).seconds(chip) == (2.0, 'compute')
  assert roofline.Cost(20.0, 4.0, 6.0).seconds(chip) == (3.0, 'links')


def test_recomputed_layers_cost_a_forward_pass():
  small = TransformerConfig(**SMALL)
  full = TransformerConfig(**SMALL, remat='full')
  args = dict(rows=2, length=64, slots=8, micro_batches=1, chips=1, fsdp=1,
              tensor=1, trained=0)
  assert roofline.train_step(full, **args).flops - roofline.train_step(
      small, **args).flops == roofline.forward_flops(small, 2, 64)


def test_weights_come_in_over_links_once_per_pass_and_micro_batch():
  c = zoo.architecture('qwen3_1p7b', dtype='bfloat16', remat='full')
  n = roofline.layer_weights(c) + c.dim * c.vocab
  cost = roofline.train_step(c, 8, 64, 8, 2, chips=8, fsdp=8, tensor=1,
                             trained=n)
  # 4 passes of 2 bytes in, a gradient of 4 bytes out, 7 of 8 slices, twice
  assert cost.linked == pytest.approx(2 * (4 * 2 + 4) * n * 7 / 8)


def test_the_quickstart_fits_a_tpu(libtpu):
  done = fit('--config.mesh.fsdp=2', '--config.sft.row_length=256',
             '--config.guide.compute_dtype=bfloat16',
             '--config.guide.remat=full')
  assert done.returncode == 0, done.stderr + done.stdout
  assert 'It fits.' in done.stdout and 'per 1,000 steps' in done.stdout
  for program in ('sft step', 'grpo step', 'prefill', 'decode'):
    assert program in done.stdout


def test_what_cannot_fit_is_said_at_once(libtpu):
  """8.19e9 weights of 12 bytes on every chip: 91.5 GiB of 15.75."""
  done = fit('--config.mesh.data=8', '--config.mesh.fsdp=1',
             config='configs/gsm8k.py:guide=qwen3_8b')
  assert done.returncode == 1
  assert 'mesh.fsdp=1: it does not fit' in done.stderr
  assert '91.5 of 15.75 GiB' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('args, code, message', [
    (dict(topology='v9:2x4'), 1, "--topology='v9:2x4': choose chips from"),
    (dict(topology='v5e:3x77'), 1, "--topology='v5e:3x77'"),
    (dict(config='configs/nowhere.py'), 2, 'nowhere')])
def test_bad_requests_name_the_flag(args, code, message):
  done = fit(**args)
  assert done.returncode == code, done.stderr
  assert message in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr


@pytest.mark.full
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v6e:2x4'])
def test_the_papers_guide_fits(libtpu, topology):
  done = fit(config='configs/gsm8k.py', topology=topology)
  assert done.returncode == 0, done.stderr + done.stdout
  assert 'It fits.' in done.stdout


@pytest.mark.full
def test_a_compiler_that_runs_out_of_memory_is_understood(libtpu):
  """Without recomputation, all rows at once: it must say what to change."""
  done = fit('--config.guide.remat=none', '--config.sft.micro_batch=0',
             '--config.sft.batch_size=64', config='configs/gsm8k.py')
  assert done.returncode == 1, done.stderr + done.stdout
  assert 'sft step does not fit' in done.stdout
  assert 'sft.micro_batch' in done.stdout


def test_default_meshes_of_configs_divide_their_rows():
  """gsm8k on 8 chips: rows of both steps over fsdp=8."""
  from configs import gsm8k
  config = gsm8k.get_config()
  assert config.sft.batch_size % 8 == config.rl.groups % 8 == 0
  assert config.rl.micro_batch % 8 == 0
  assert default_config().mesh.fsdp == 1
