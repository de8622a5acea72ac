"""Adapters merged into the weights that they adapt (Hu et al., 2021)."""

from __future__ import annotations

import functools

import jax

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


def _add(scale, kernel, a, b):
  """Stacked over layers: [N, in, out] + scale * [N, in, R] [N, R, out]."""
  return kernel + scale * (a @ b)
