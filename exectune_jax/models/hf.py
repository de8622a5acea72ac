"""Llama-family checkpoints from Hugging Face directories.

Reads config.json and one or several safetensors files. Hugging Face stores
linear weights as [out, in]; ours are [in, out], stacked over layers.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

from exectune_jax.errors import UserError
from exectune_jax.models.transformer import TransformerConfig

# our name inside a block -> Hugging Face name inside a layer
_LINEAR = {'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj',
           'v': 'self_attn.v_proj', 'o': 'self_attn.o_proj',
           'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj',
           'down': 'mlp.down_proj'}
_NORM = {'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}


def read_config(directory: str | pathlib.Path, **changes) -> TransformerConfig:
  """Architecture from config.json (transformers 5 fields and older ones)."""
  path = pathlib.Path(directory) / 'config.json'
  try:
    raw = json.loads(path.read_text())
  except OSError as e:
    raise UserError(f"guide.checkpoint='{directory}': no readable config.json;"
                    ' name a Hugging Face directory') from e
  except json.JSONDecodeError as e:
    raise UserError(f'{path}: not JSON: {e.msg}') from e
  if raw.get('model_type') != 'llama':
    raise UserError(f"{path}: model_type='{raw.get('model_type')}': only "
                    "'llama' checkpoints (Llama, SmolLM2) can be read")
  rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind != 'default' or raw.get('attention_bias') or raw.get('mlp_bias'):
    raise UserError(f'{path}: rope_type={kind!r} or biases: not supported; '
                    'use a checkpoint with plain RoPE and without biases')
  heads = raw['num_attention_heads']
  return TransformerConfig(**{**dict(
      vocab=raw['vocab_size'], dim=raw['hidden_size'],
      layers=raw['num_hidden_layers'], heads=heads,
      kv_heads=raw.get('num_key_value_heads') or heads,
      head_dim=raw.get('head_dim') or raw['hidden_size'] // heads,
      mlp_dim=raw['intermediate_size'],
      rope_theta=float(rope.get('rope_theta', raw.get('rope_theta', 1e4))),
      norm_eps=raw.get('rms_norm_eps', 1e-6),
      tied=raw.get('tie_word_embeddings', False)), **changes})


def read_params(directory: str | pathlib.Path,
                config: TransformerConfig) -> dict:
  """Parameters as float32 numpy arrays, in the tree that the model uses.

  Raises:
    UserError: a tensor is missing or has another shape; names both shapes.
  """
  tensors = _Tensors(pathlib.Path(directory))
  c = config
  width = {'q': c.heads * c.head_dim, 'k': c.kv_heads * c.head_dim,
           'v': c.kv_heads * c.head_dim, 'gate': c.mlp_dim, 'up': c.mlp_dim}
  shapes = {n: (w, c.dim) for n, w in width.items()} | {
      'o': (c.dim, c.heads * c.head_dim), 'down': (c.dim, c.mlp_dim)}
  layer = 'model.layers.{}.'
  blocks = {
      name: {'kernel': np.stack([
          tensors.get(f'{layer.format(i)}{hf}.weight', shapes[name]).T
          for i in range(c.layers)])}
      for name, hf in _LINEAR.items()}
  for name, hf in _NORM.items():
    blocks[name] = {'scale': np.stack([
        tensors.get(f'{layer.format(i)}{hf}.weight', (c.dim,))
        for i in range(c.layers)])}
  params = {
      'embed': {'embedding': tensors.get('model.embed_tokens.weight',
                                         (c.vocab, c.dim))},
      'blocks': blocks,
      'final_norm': {'scale': tensors.get('model.norm.weight', (c.dim,))}}
  if not c.tied:
    params['head'] = {
        'kernel': tensors.get('lm_head.weight', (c.vocab, c.dim)).T}
  return params


class _Tensors:
  """Named tensors of one or several safetensors files."""

  def __init__(self, directory: pathlib.Path):
    from safetensors import safe_open
    self._files = sorted(directory.glob('*.safetensors'))
    if not self._files:
      raise UserError(f"guide.checkpoint='{directory}': no *.safetensors file")
    self._where = {}
    for path in self._files:
      try:
        with safe_open(path, 'flax') as f:
          self._where.update(dict.fromkeys(f.keys(), path))
      except Exception as e:  # safetensors has its own error class per version
        raise UserError(f'{path}: not a readable safetensors file: {e}') from e

  def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    from safetensors import safe_open
    if name not in self._where:
      raise UserError(f"{self._files[0].parent}: tensor '{name}' is missing; "
                      'the checkpoint is of another model')
    with safe_open(self._where[name], 'numpy') as f:
      tensor = f.get_tensor(name)
    if tensor.shape != shape:
      raise UserError(f"{self._where[name]}: tensor '{name}' has shape "
                      f'{tensor.shape}, config.json says {shape}')
    return np.asarray(tensor, np.float32)
