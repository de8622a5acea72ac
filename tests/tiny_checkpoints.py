"""Small random checkpoints in Hugging Face format, from numpy alone.

The weights depend on numpy's PCG64 stream only, so logits computed once with
transformers on torch can be kept as numbers (golden/logits.json).
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

PROMPT = [[3, 17, 42, 8, 25, 31, 1, 60], [5, 5, 9, 50, 0, 0, 0, 0]]
LENGTHS = [8, 4]
HEADS, HEAD_DIM, DIM, MLP, LAYERS, VOCAB = 4, 8, 32, 48, 3, 64

_LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 5000.0, 'factor': 8.0,
           'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 32}
FAMILIES = {  # differences from a Llama with tied embeddings and 2 kv heads
    'llama': {},
    'llama_untied': {'tie_word_embeddings': False, 'num_key_value_heads': 4},
    'llama_mqa': {'tie_word_embeddings': False, 'num_key_value_heads': 1},
    'llama3': {'rope_parameters': _LLAMA3},
    'qwen2': {'model_type': 'qwen2', 'architectures': ['Qwen2ForCausalLM']},
    'qwen3': {'model_type': 'qwen3', 'architectures': ['Qwen3ForCausalLM'],
              'head_dim': 16},
    'qwen3_untied': {'model_type': 'qwen3', 'tie_word_embeddings': False,
                     'architectures': ['Qwen3ForCausalLM']},
    'gemma3': {
        'model_type': 'gemma3_text', 'architectures': ['Gemma3ForCausalLM'],
        'layer_types': ['sliding_attention', 'full_attention',
                        'sliding_attention'], 'sliding_window': 3,
        'query_pre_attn_scalar': 16, 'hidden_activation': 'gelu_pytorch_tanh',
        'rope_parameters': {
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
            'full_attention': {'rope_type': 'linear', 'factor': 8.0,
                               'rope_theta': 5000.0}}},
}
_OLD = {  # the same in the fields that transformers had before 5
    'llama': {'rope_theta': 5000.0},
    'llama3': {'rope_theta': 5000.0, 'rope_scaling': {
        k: v for k, v in _LLAMA3.items() if k != 'rope_theta'}},
    'gemma3': {'rope_theta': 5000.0, 'rope_local_base_freq': 100.0,
               'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}},
}


def config_of(family: str, old_fields: bool = False) -> dict:
  config = {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
            'hidden_size': DIM, 'num_hidden_layers': LAYERS,
            'num_attention_heads': HEADS, 'num_key_value_heads': 2,
            'head_dim': HEAD_DIM, 'intermediate_size': MLP,
            'vocab_size': VOCAB, 'rms_norm_eps': 1e-5, 'hidden_act': 'silu',
            'max_position_embeddings': 64, 'tie_word_embeddings': True,
            'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0,
            'dtype': 'float32', 'rope_parameters': {
                'rope_type': 'default', 'rope_theta': 5000.0},
            **FAMILIES[family]}
  if old_fields and family in _OLD:
    del config['rope_parameters']
    config |= _OLD[family]
  return config


def write(folder: pathlib.Path, family: str = 'llama', sharded=False,
          dtype=np.float32, old_fields=False) -> pathlib.Path:
  """Writes config.json and weights; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  config = config_of(family, old_fields)
  (folder / 'config.json').write_text(json.dumps(config))
  tensors = _tensors(config, dtype)
  if sharded:
    names = sorted(tensors)
    for i, part in enumerate((names[:9], names[9:])):
      save_file({n: tensors[n] for n in part},
                folder / f'model-0000{i + 1}-of-00002.safetensors',
                {'format': 'pt'})
    (folder / 'model.safetensors.index.json').write_text(json.dumps(
        {'metadata': {}, 'weight_map': {
            n: f'model-0000{1 + (n not in names[:9])}-of-00002.safetensors'
            for n in names}}))
  else:
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  return folder


def _tensors(config, dtype):
  rng = np.random.default_rng(7)
  kind, kv = config['model_type'], config['num_key_value_heads']
  size = config['head_dim']

  def draw(*shape):
    return rng.normal(0, 0.15, shape).astype(dtype)

  def norm(width):  # Gemma stores the difference from one
    return draw(width) if kind == 'gemma3_text' else (
        1 + draw(width)).astype(dtype)

  tensors = {'model.embed_tokens.weight': draw(VOCAB, DIM),
             'model.norm.weight': norm(DIM)}
  for i in range(LAYERS):
    p = f'model.layers.{i}.'
    for name, rows, columns in (
        ('self_attn.q_proj', HEADS * size, DIM),
        ('self_attn.k_proj', kv * size, DIM),
        ('self_attn.v_proj', kv * size, DIM),
        ('self_attn.o_proj', DIM, HEADS * size),
        ('mlp.gate_proj', MLP, DIM), ('mlp.up_proj', MLP, DIM),
        ('mlp.down_proj', DIM, MLP)):
      tensors[f'{p}{name}.weight'] = draw(rows, columns)
      if kind == 'qwen2' and name[-6] in 'qkv':
        tensors[f'{p}{name}.bias'] = draw(rows)
    names = ['input_layernorm', 'post_attention_layernorm']
    if kind == 'gemma3_text':
      names += ['pre_feedforward_layernorm', 'post_feedforward_layernorm']
    for name in names:
      tensors[f'{p}{name}.weight'] = norm(DIM)
    if kind in ('qwen3', 'gemma3_text'):
      for name in ('q_norm', 'k_norm'):
        tensors[f'{p}self_attn.{name}.weight'] = norm(size)
  if not config['tie_word_embeddings']:
    tensors['lm_head.weight'] = draw(VOCAB, DIM)
  return tensors


def torch_logits(folder: pathlib.Path) -> np.ndarray:
  """Logits [2, 8, 64] of PROMPT by transformers on torch, in float32."""
  import torch
  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation='eager')
  mask = [[1] * n + [0] * (8 - n) for n in LENGTHS]
  with torch.no_grad():
    return model(torch.tensor(PROMPT),
                 attention_mask=torch.tensor(mask)).logits.numpy()


def chosen(logits: np.ndarray) -> np.ndarray:
  """The last valid position of both rows, and one in the middle."""
  return np.stack([logits[0, 7], logits[1, 3], logits[0, 3]])


if __name__ == '__main__':  # makes golden/logits.json; needs torch
  import tempfile
  golden = {}
  for family in FAMILIES:
    with tempfile.TemporaryDirectory() as d:
      logits = torch_logits(write(pathlib.Path(d), family))
    golden[family] = np.round(chosen(logits).astype(float), 6).tolist()
  path = pathlib.Path(__file__).parent / 'golden' / 'logits.json'
  path.write_text(json.dumps(golden) + '\n')
