"""Two things to do with a Llama-family GGUF file.

  python -m launch.gguf_model requantize IN.gguf OUT.gguf   (weights to Q8_0)
  python -m launch.gguf_model guide IN.gguf OUT_DIR         (a guide directory)

The second writes config.json, model.safetensors and the tokenizer, readable
by transformers and by guide.checkpoint. Needs the extra `local` (gguf).
"""

import json
import pathlib
import sys

import gguf
import numpy as np

_LAYER = {  # GGUF name -> Hugging Face name inside a layer
    'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
    'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
    'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj'}
_TOP = {'token_embd.weight': 'model.embed_tokens.weight',
        'output_norm.weight': 'model.norm.weight',
        'output.weight': 'lm_head.weight'}


def requantize(source: str, target: str) -> None:
  """Rewrites all quantised tensors as Q8_0; metadata stays as it is."""
  reader = gguf.GGUFReader(source)
  writer = gguf.GGUFWriter(target, _field(reader, 'general.architecture'))
  written = {'general.architecture', 'general.file_type'}
  for name, field in reader.fields.items():
    if name in written or name.startswith('GGUF.'):
      continue
    kind = field.types[0]
    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), kind, inner)
  q8 = gguf.GGMLQuantizationType.Q8_0
  for tensor in reader.tensors:
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
      writer.add_tensor(tensor.name, np.array(tensor.data))
    else:
      weights = gguf.dequantize(tensor.data, tensor.tensor_type)
      writer.add_tensor(tensor.name, gguf.quantize(
          weights.astype(np.float32), q8), raw_dtype=q8)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def guide(source: str, target: str) -> None:
  """Writes the model as a Hugging Face directory in float32."""
  from safetensors.numpy import save_file
  reader = gguf.GGUFReader(source)
  if _field(reader, 'general.architecture') != 'llama':
    raise SystemExit(f'error: {source}: only Llama-family models can be '
                     'guides')
  folder = pathlib.Path(target)
  folder.mkdir(parents=True, exist_ok=True)
  config = _config(reader)
  tensors = {}
  for tensor in reader.tensors:
    weights = gguf.dequantize(tensor.data, tensor.tensor_type)
    weights = np.ascontiguousarray(weights, np.float32)
    tensors.update(_rename(tensor.name, weights, config))
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  config['tie_word_embeddings'] = 'lm_head.weight' not in tensors
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  _tokenizer(reader, folder)


def _field(reader, name):
  return reader.fields[name].contents()


def _config(reader) -> dict:
  def get(name):
    return _field(reader, f'llama.{name}')
  heads = get('attention.head_count')
  return {
      'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
      'hidden_size': get('embedding_length'),
      'num_hidden_layers': get('block_count'), 'num_attention_heads': heads,
      'num_key_value_heads': get('attention.head_count_kv'),
      'head_dim': get('embedding_length') // heads,
      'intermediate_size': get('feed_forward_length'),
      'rms_norm_eps': get('attention.layer_norm_rms_epsilon'),
      'max_position_embeddings': get('context_length'),
      'rope_parameters': {'rope_type': 'default',
                          'rope_theta': get('rope.freq_base')},
      'vocab_size': len(_field(reader, 'tokenizer.ggml.tokens')),
      'bos_token_id': _field(reader, 'tokenizer.ggml.bos_token_id'),
      'eos_token_id': _field(reader, 'tokenizer.ggml.eos_token_id'),
      'hidden_act': 'silu', 'dtype': 'float32'}


def _rename(name, weights, config):
  if name in _TOP:
    return {_TOP[name]: weights}
  if not name.startswith('blk.'):
    return {}  # rope_freqs and the like
  _, layer, kind, _ = name.split('.')
  heads = {'attn_q': config['num_attention_heads'],
           'attn_k': config['num_key_value_heads']}.get(kind)
  if heads:
    # GGUF interleaves the two rotary halves of each head; Hugging Face
    # keeps one half after the other.
    rows, columns = weights.shape
    weights = np.ascontiguousarray(
        weights.reshape(heads, rows // heads // 2, 2, columns)
        .swapaxes(1, 2).reshape(rows, columns))
  return {f'model.layers.{layer}.{_LAYER[kind]}.weight': weights}


def _tokenizer(reader, folder):
  """A byte-level BPE tokenizer from the GGUF's vocabulary and merges."""
  import tokenizers
  import transformers
  words = _field(reader, 'tokenizer.ggml.tokens')
  kinds = _field(reader, 'tokenizer.ggml.token_type')
  merges = [tuple(m.split(' ')) for m in _field(reader,
                                                'tokenizer.ggml.merges')]
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
      {w: i for i, w in enumerate(words)}, merges))
  pre = tokenizers.pre_tokenizers
  steps = [pre.ByteLevel(add_prefix_space=False)]
  if _field(reader, 'tokenizer.ggml.pre') == 'smollm':
    steps.insert(0, pre.Digits(individual_digits=True))
  bpe.pre_tokenizer = pre.Sequence(steps)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  control = 3  # GGUF token type
  bpe.add_special_tokens([w for w, k in zip(words, kinds, strict=True)
                          if k == control])
  eos = words[_field(reader, 'tokenizer.ggml.eos_token_id')]
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe, eos_token=eos, pad_token=eos,
      bos_token=words[_field(reader, 'tokenizer.ggml.bos_token_id')])
  fast.chat_template = _field(reader, 'tokenizer.chat_template')
  fast.save_pretrained(folder)


if __name__ == '__main__':
  if len(sys.argv) != 4 or sys.argv[1] not in ('requantize', 'guide'):
    sys.exit(__doc__)
  {'requantize': requantize, 'guide': guide}[sys.argv[1]](*sys.argv[2:])
