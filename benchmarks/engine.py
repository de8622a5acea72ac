"""What the benchmarks share: our guide and the peers', from one directory."""

from __future__ import annotations

import functools

import jax
import numpy as np

from exectune_jax import roofline
from exectune_jax.config import default_config
from exectune_jax.learning import sharding, steps
from exectune_jax.models import attention, hf
from exectune_jax.models.transformer import Transformer, init_variables


def ours(args, remat: str = 'full'):
  """(model, variables, mesh) of args.checkpoint in args.dtype."""
  mesh = sharding.make_mesh(default_config().mesh)
  config = hf.read_config(
      args.checkpoint, dtype=args.dtype, remat=remat,
      attention=attention.choose('auto', jax.default_backend(), args.dtype))
  model = Transformer(config, mesh)
  shapes = jax.eval_shape(functools.partial(init_variables, model),
                          jax.random.key(0))['params']
  params = hf.read_params(args.checkpoint, config, shapes,
                          sharding.shardings(shapes, mesh))
  return model, {'params': params}, mesh


def trainer(args, make_step, batch):
  """A function that does one update on `batch` and waits for its loss.

  make_step: from (model, tx) to an update step.
  """
  model, variables, mesh = ours(args)
  tx = steps.optimizer(default_config().optim, 1e-6, 1)
  _, where = steps.state_shardings(model, tx, mesh)
  state = steps.new_state(variables, tx, where)
  step = steps.compile_step(make_step(model, tx), mesh, where)
  batch = jax.device_put(batch, sharding.rows(mesh))
  def run():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
  return run


def torch_model(args):
  """transformers on torch, and the device that it is on."""
  import torch
  from transformers import AutoModelForCausalLM
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = AutoModelForCausalLM.from_pretrained(
      args.checkpoint, dtype=getattr(torch, args.dtype)).to(device)
  return model, device


def torch_trainer(args, prepare):
  """The same of torch: gradients, clipping, AdamW.

  prepare: from the device to a function of the model that does the backward
    passes of one update.
  """
  import torch
  model, device = torch_model(args)
  backward = prepare(device)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
  def run():
    optimizer.zero_grad()
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if device == 'cuda':
      torch.cuda.synchronize()
  return run


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(3, 1000, (rows, length))


def model_flops(args, tokens: int, pairs: float, predicted: int) -> float:
  """Operations of one forward pass that no implementation can avoid.

  tokens: that are read. pairs: of a query and a key that it sees. predicted:
    tokens that need logits.
  """
  c = hf.read_config(args.checkpoint)
  scores = 4 * c.layers * c.heads * c.head_dim * pairs
  return (2 * roofline.layer_weights(c) * tokens + scores
          + roofline.head_flops(c, predicted))
