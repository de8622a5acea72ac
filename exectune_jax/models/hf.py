"""Checkpoints in Hugging Face format, read and written.

A directory holds config.json and one or several safetensors files. Its linear
weights are [out, in]; ours are [in, out], stacked over layers. One table says
where each of our parameters is found, for both directions.

Reading goes slice by slice straight to where a parameter will live, so that
the host never holds more than one shard of one stacked parameter.
"""

from __future__ import annotations

import gc
import json
import pathlib

import jax
import ml_dtypes
import numpy as np

from exectune_jax.errors import UserError
from exectune_jax.learning import hosts
from exectune_jax.learning import sharding as place
from exectune_jax.models.transformer import TransformerConfig

FILE_BYTES = 4 << 30  # a written file holds at most about so much
DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


# ---------------------------------------------------------------- config

def read_config(directory: str | pathlib.Path, **changes) -> TransformerConfig:
  """Architecture from config.json (transformers 5 fields and older ones).

  Raises:
    UserError: no such file, or a model that the decoder does not cover.
  """
  path = pathlib.Path(directory) / 'config.json'
  try:
    raw = json.loads(path.read_text())
  except OSError as e:
    raise UserError(f"guide.checkpoint='{directory}': no readable config.json;"
                    ' name a Hugging Face directory') from e
  except json.JSONDecodeError as e:
    raise UserError(f'{path}: not JSON: {e.msg}') from e
  raw = raw.get('text_config', raw)  # Gemma 3 with a vision tower
  kind = raw.get('model_type')
  if kind not in _FAMILIES:
    raise UserError(f"{path}: model_type='{kind}': choose a checkpoint of one "
                    f'of {", ".join(_FAMILIES)}')
  heads = raw['num_attention_heads']
  common = dict(
      vocab=raw['vocab_size'], dim=raw['hidden_size'],
      layers=raw['num_hidden_layers'], heads=heads,
      kv_heads=raw.get('num_key_value_heads') or heads,
      head_dim=raw.get('head_dim') or raw['hidden_size'] // heads,
      mlp_dim=raw['intermediate_size'],
      norm_eps=raw.get('rms_norm_eps', 1e-6),
      tied=raw.get('tie_word_embeddings', kind.startswith('gemma')))
  if (raw.get('attention_bias') and kind != 'qwen2') or raw.get('mlp_bias'):
    raise UserError(f'{path}: attention_bias or mlp_bias: not supported; use '
                    'a checkpoint without them')
  return TransformerConfig(**{**common, **_rope(raw, path),
                              **_FAMILIES[kind](raw), **changes})


def _rope(raw, path) -> dict:
  """Rotary fields, from rope_parameters or the older names."""
  new = raw.get('rope_parameters') or {}
  wide = new.get('full_attention', new) or raw.get('rope_scaling') or {}
  kind = wide.get('rope_type', wide.get('type', 'default'))
  if kind == 'linear':
    scaling = ('linear', float(wide['factor']))
  elif kind == 'llama3':
    scaling = ('llama3', *(float(wide[name]) for name in (
        'factor', 'low_freq_factor', 'high_freq_factor')),
        wide['original_max_position_embeddings'])
  elif kind == 'default':
    scaling = ()
  else:
    raise UserError(f"{path}: rope_type='{kind}': use a checkpoint with "
                    'default, linear or llama3 rotary embeddings')
  return {'rope_scaling': scaling,
          'rope_theta': float(wide.get('rope_theta',
                                       raw.get('rope_theta', 1e4)))}


def _windows(raw, default_types=None) -> tuple[int, ...]:
  types = raw.get('layer_types') or default_types or ()
  windows = tuple(raw['sliding_window'] if t == 'sliding_attention' else 0
                  for t in types)
  return windows if any(windows) else ()


def _qwen2(raw):
  count, types = raw['num_hidden_layers'], None
  if raw.get('use_sliding_window'):
    first = raw.get('max_window_layers', count)
    types = ['sliding_attention' if i >= first else 'full_attention'
             for i in range(count)]
  return dict(qkv_bias=True, windows=_windows(raw, types))


def _gemma3(raw):
  every = raw.get('sliding_window_pattern', 6)
  types = ['full_attention' if (i + 1) % every == 0 else 'sliding_attention'
           for i in range(raw['num_hidden_layers'])]
  local = (raw.get('rope_parameters') or {}).get('sliding_attention', {})
  return dict(
      windows=_windows(raw, types), qk_norm=True, scale_embeddings=True,
      norm_plus_one=True, post_norms=True, activation='gelu',
      query_scale=(raw.get('query_pre_attn_scalar') or 256) ** -0.5,
      rope_theta=float(
          (raw.get('rope_parameters') or {}).get('full_attention', {}).get(
              'rope_theta', raw.get('rope_theta', 1e6))),
      local_rope_theta=float(local.get(
          'rope_theta', raw.get('rope_local_base_freq', 1e4))))


_FAMILIES = {
    'llama': lambda raw: {},
    'qwen2': _qwen2,
    'qwen3': lambda raw: dict(
        qk_norm=True, windows=_windows(raw) if raw.get('use_sliding_window')
        else ()),
    'gemma3_text': _gemma3,
}


# --------------------------------------------------------------- tensors

def table(c: TransformerConfig) -> dict[str, tuple[str, bool]]:
  """Our parameter path -> (Hugging Face name, transposed?).

  Names of block parameters have {} for the layer. Paths are joined by '/'.
  """
  after = 'pre_feedforward_layernorm' if c.post_norms else (
      'post_attention_layernorm')
  norms = {'attn_norm': 'input_layernorm', 'mlp_norm': after}
  if c.post_norms:
    norms |= {'post_attn_norm': 'post_attention_layernorm',
              'post_mlp_norm': 'post_feedforward_layernorm'}
  if c.qk_norm:
    norms |= {'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm'}
  linear = {**{n: f'self_attn.{n}_proj' for n in 'qkvo'},
            **{n: f'mlp.{n}_proj' for n in ('gate', 'up', 'down')}}
  rows = {'embed/embedding': ('embed_tokens.weight', False),
          'final_norm/scale': ('norm.weight', False)}
  for ours, theirs in linear.items():
    rows[f'blocks/{ours}/kernel'] = (f'layers.{{}}.{theirs}.weight', True)
    if c.qkv_bias and ours in 'qkv':
      rows[f'blocks/{ours}/bias'] = (f'layers.{{}}.{theirs}.bias', False)
  for ours, theirs in norms.items():
    rows[f'blocks/{ours}/scale'] = (f'layers.{{}}.{theirs}.weight', False)
  if not c.tied:
    rows['head/kernel'] = ('lm_head.weight', True)
  return rows


def read_params(directory: str | pathlib.Path, config: TransformerConfig,
                shapes, shardings):
  """Float32 parameters on their devices.

  Args:
    directory: Hugging Face directory.
    config: its architecture.
    shapes, shardings: trees of the model's parameters.

  Raises:
    UserError: a tensor is missing or has another shape; names both shapes.
  """
  rows = table(config)
  with _Tensors(pathlib.Path(directory)) as tensors:
    def leaf(path, shape, sharding):
      name, transposed = rows[_join(path)]
      stacked = '{}' in name
      one = shape.shape[1:] if stacked else shape.shape
      stored = one[::-1] if transposed else one
      names = [name.format(i) for i in range(config.layers)] if stacked else [
          name]
      for n in names:
        tensors.check(n, stored)

      def shard(index):
        rest = index[1:] if stacked else index
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(
            index, shape.shape, strict=True)], np.float32)
        for i, n in enumerate(names[index[0]] if stacked else names):
          part = tensors.slice(n, rest[::-1] if transposed else rest)
          out[i if stacked else ...] = part.T if transposed else part
        return out

      held = place.build(shape.shape, sharding, shard)
      jax.block_until_ready(held)
      gc.collect(0)  # JAX lets go of host buffers then; before the next one
      return held

    return jax.tree_util.tree_map_with_path(leaf, shapes, shardings)


def write(directory: pathlib.Path, config: TransformerConfig, params,
          dtype: str, metadata: dict) -> None:
  """Writes safetensors files (and an index for several) and config.json.

  Args:
    directory: made if needed.
    config: architecture.
    params: parameters; fetched tensor by tensor.
    dtype: a key of DTYPES, of the written tensors.
    metadata: further fields of config.json (token ids).
  """
  directory.mkdir(parents=True, exist_ok=True)
  target = DTYPES[dtype]
  leaves = {_join(path): leaf for path, leaf
            in jax.tree_util.tree_leaves_with_path(params)}
  plan = []  # (name, path, layer or -1, transposed)
  for path, (name, transposed) in table(config).items():
    name = name if name.startswith('lm_head') else f'model.{name}'
    plan += [(name.format(i), path, i, transposed)
             for i in range(config.layers)] if '{}' in name else [
                 (name, path, -1, transposed)]
  files, size = [[]], 0
  for row in sorted(plan, key=lambda r: r[2]):
    leaf = leaves[row[1]]
    count = leaf.size // (leaf.shape[0] if row[2] >= 0 else 1)
    bytes_ = count * np.dtype(target).itemsize
    if files[-1] and size + bytes_ > FILE_BYTES:
      files.append([])
      size = 0
    files[-1].append(row)
    size += bytes_
  _write_files(directory, files, leaves, target)
  text = json.dumps({**config_json(config), 'dtype': dtype, **metadata},
                    indent=2)
  if hosts.first():
    (directory / 'config.json').write_text(text + '\n')


def _write_files(directory, files, leaves, target):
  from safetensors.numpy import save_file
  index = {}
  for number, rows in enumerate(files, 1):
    file = 'model.safetensors' if len(files) == 1 else (
        f'model-{number:05}-of-{len(files):05}.safetensors')
    tensors = {}
    for name, path, layer, transposed in rows:
      value = place.fetch(leaves[path], layer)
      tensors[name] = np.ascontiguousarray(
          value.T if transposed else value).astype(target)
      index[name] = file
    if hosts.first():
      save_file(tensors, directory / file, {'format': 'pt'})
  if len(files) > 1:
    (directory / 'model.safetensors.index.json').write_text(json.dumps(
        {'metadata': {}, 'weight_map': index}, indent=2) + '\n')


def config_json(c: TransformerConfig) -> dict:
  """config.json of an architecture, in the fields of transformers 5."""
  kind = ('gemma3_text' if c.post_norms else 'qwen3' if c.qk_norm else
          'qwen2' if c.qkv_bias else 'llama')
  rope = {'rope_type': 'default', 'rope_theta': c.rope_theta}
  if c.rope_scaling:
    rope |= dict(zip(
        ('rope_type', 'factor', 'low_freq_factor', 'high_freq_factor',
         'original_max_position_embeddings'), c.rope_scaling, strict=False))
  raw = {
      'model_type': kind, 'vocab_size': c.vocab, 'hidden_size': c.dim,
      'num_hidden_layers': c.layers, 'num_attention_heads': c.heads,
      'num_key_value_heads': c.kv_heads, 'head_dim': c.head_dim,
      'intermediate_size': c.mlp_dim, 'rms_norm_eps': c.norm_eps,
      'tie_word_embeddings': c.tied, 'rope_parameters': rope,
      'max_position_embeddings': 32_768,
      'architectures': [{'gemma3_text': 'Gemma3ForCausalLM',
                         'qwen3': 'Qwen3ForCausalLM',
                         'qwen2': 'Qwen2ForCausalLM',
                         'llama': 'LlamaForCausalLM'}[kind]]}
  if kind == 'gemma3_text':
    raw |= {'query_pre_attn_scalar': round(c.scale ** -2),
            'hidden_activation': 'gelu_pytorch_tanh',
            'rope_parameters': {
                'full_attention': rope, 'sliding_attention': {
                    'rope_type': 'default', 'rope_theta': c.local_rope_theta}}}
  else:
    raw['hidden_act'] = 'silu'
  if any(c.windows):
    raw |= {'sliding_window': max(c.windows), 'use_sliding_window': True,
            'layer_types': ['sliding_attention' if w else 'full_attention'
                            for w in c.windows]}
  return raw


def _join(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


class _Tensors:
  """Named tensors of the safetensors files of a directory."""

  def __init__(self, directory: pathlib.Path):
    from safetensors import safe_open
    self.directory = directory
    paths = sorted(directory.glob('*.safetensors'))
    if not paths:
      raise UserError(f"guide.checkpoint='{directory}': no *.safetensors file")
    self._files, self._where = [], {}
    for path in paths:
      try:
        file = safe_open(path, 'numpy')
      except Exception as e:  # safetensors has its own error class per version
        raise UserError(f'{path}: not a readable safetensors file: {e}') from e
      self._files.append(file)
      self._where.update({name: (path, file) for name in file.keys()})
    # 'model.', or longer where a language model is part of something else
    self.prefix = next((n.removesuffix('embed_tokens.weight')
                        for n in self._where
                        if n.endswith('embed_tokens.weight')), 'model.')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._files.clear()
    self._where.clear()

  def _find(self, name):
    full = name if name.startswith('lm_head') else self.prefix + name
    if full not in self._where:
      raise UserError(f"{self.directory}: tensor '{full}' is missing; the "
                      'checkpoint is incomplete or of another model')
    return full, *self._where[full]

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    full, path, file = self._find(name)
    found = tuple(file.get_slice(full).get_shape())
    if found != shape:
      raise UserError(f"{path}: tensor '{full}' has shape {found}, config.json "
                      f'says {shape}')

  def slice(self, name: str, index) -> np.ndarray:
    full, _, file = self._find(name)
    return np.asarray(file.get_slice(full)[tuple(index)])
