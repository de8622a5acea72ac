"""Adapters (Hu et al., 2021) on their way out: merged, or in PEFT's format."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import numpy as np

from exectune_jax.learning import hosts
from exectune_jax.learning import sharding as place
from exectune_jax.models import hf
from exectune_jax.models.transformer import TransformerConfig


def merge(variables: dict, config: TransformerConfig):
  """Parameters with W + alpha / R * A B in the place of each adapted W.

  Args:
    variables: {'params': ...} and, with adapters, {'lora': ...}.
    config: of the adapted model.
  """
  params = variables['params']
  if 'lora' not in variables:
    return params
  add = jax.jit(functools.partial(_add, config.lora_alpha / config.lora_rank))
  blocks = dict(params['blocks'])
  for name, adapter in variables['lora']['blocks'].items():
    blocks[name] = {**blocks[name], 'kernel': add(
        blocks[name]['kernel'], adapter['a'], adapter['b'])}
  return {**params, 'blocks': blocks}


def write(directory: pathlib.Path, lora: dict, config: TransformerConfig,
          base: str) -> None:
  """Writes the adapters as a directory for the library peft.

  Args:
    directory: made if needed.
    lora: the collection of adapters; a [N, in, R], b [N, R, out].
    config: of the adapted model.
    base: directory or hub name of the weights that they adapt.
  """
  from safetensors.numpy import save_file
  directory.mkdir(parents=True, exist_ok=True)
  names, tensors = hf.table(config), {}
  for ours, adapter in lora['blocks'].items():
    theirs, _ = names[f'blocks/{ours}/kernel']
    theirs = 'base_model.model.model.' + theirs.removesuffix('.weight')
    for i in range(config.layers):
      for side, name in (('a', 'lora_A'), ('b', 'lora_B')):
        tensors[f'{theirs.format(i)}.{name}.weight'] = np.ascontiguousarray(
            place.fetch(adapter[side], i).T)
  if not hosts.first():
    return
  save_file(tensors, directory / 'adapter_model.safetensors',
            {'format': 'pt'})
  (directory / 'adapter_config.json').write_text(json.dumps({
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'bias': 'none',
      'base_model_name_or_path': base, 'r': config.lora_rank,
      'lora_alpha': config.lora_alpha, 'lora_dropout': 0.0,
      'fan_in_fan_out': False, 'inference_mode': True,
      'target_modules': sorted({n.split('.')[-3] for n in tensors})},
      indent=2) + '\n')


def _add(scale, kernel, a, b):
  """Stacked over layers: [N, in, out] + scale * [N, in, R] [N, R, out]."""
  return kernel + scale * (a @ b)
