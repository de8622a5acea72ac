"""A small random Llama checkpoint in Hugging Face format, from numpy alone.

The weights depend on numpy's PCG64 stream only, so logits computed once with
transformers on torch can be kept as numbers (golden/llama_logits.json).
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

PROMPT = [[3, 17, 42, 8, 25, 31, 1, 60], [5, 5, 9, 50, 0, 0, 0, 0]]
LENGTHS = [8, 4]


def write(folder: pathlib.Path, tied: bool, kv_heads: int, sharded=False,
          dtype=np.float32, old_fields=False) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  dim, layers, heads, mlp, vocab, head_dim = 32, 3, 4, 48, 64, 8
  config = {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
            'hidden_size': dim, 'num_hidden_layers': layers,
            'num_attention_heads': heads, 'num_key_value_heads': kv_heads,
            'head_dim': head_dim, 'intermediate_size': mlp,
            'vocab_size': vocab, 'rms_norm_eps': 1e-5, 'hidden_act': 'silu',
            'max_position_embeddings': 64, 'tie_word_embeddings': tied,
            'bos_token_id': 1, 'eos_token_id': 2, 'dtype': 'float32'}
  if old_fields:
    config['rope_theta'] = 5000.0
  else:
    config['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 5000.0}
  (folder / 'config.json').write_text(json.dumps(config))
  rng = np.random.default_rng(7)

  def draw(*shape):
    return rng.normal(0, 0.15, shape).astype(dtype)

  tensors = {'model.embed_tokens.weight': draw(vocab, dim),
             'model.norm.weight': (1 + draw(dim)).astype(dtype)}
  for i in range(layers):
    p = f'model.layers.{i}.'
    for name, rows, columns in (
        ('self_attn.q_proj', heads * head_dim, dim),
        ('self_attn.k_proj', kv_heads * head_dim, dim),
        ('self_attn.v_proj', kv_heads * head_dim, dim),
        ('self_attn.o_proj', dim, heads * head_dim),
        ('mlp.gate_proj', mlp, dim), ('mlp.up_proj', mlp, dim),
        ('mlp.down_proj', dim, mlp)):
      tensors[f'{p}{name}.weight'] = draw(rows, columns)
    for name in ('input_layernorm', 'post_attention_layernorm'):
      tensors[f'{p}{name}.weight'] = (1 + draw(dim)).astype(dtype)
  if not tied:
    tensors['lm_head.weight'] = draw(vocab, dim)
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


def torch_logits(folder: pathlib.Path) -> np.ndarray:
  """Logits [2, 8, 64] of PROMPT by transformers on torch."""
  import torch
  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  mask = [[1] * n + [0] * (8 - n) for n in LENGTHS]
  with torch.no_grad():
    return model(torch.tensor(PROMPT),
                 attention_mask=torch.tensor(mask)).logits.numpy()


if __name__ == '__main__':  # makes golden/llama_logits.json; needs torch
  import tempfile
  golden = {}
  for tied, kv in ((True, 2), (False, 4), (False, 1)):
    with tempfile.TemporaryDirectory() as d:
      logits = torch_logits(write(pathlib.Path(d), tied, kv))
    # the last valid position of both rows, and one in the middle
    golden[f'tied={tied},kv={kv}'] = [
        np.round(logits[r, c].astype(float), 6).tolist()
        for r, c in ((0, 7), (1, 3), (0, 3))]
  path = pathlib.Path(__file__).parent / 'golden' / 'llama_logits.json'
  path.write_text(json.dumps(golden) + '\n')
