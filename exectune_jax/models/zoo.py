"""Named sizes of guides.

'tiny' is trained from scratch and gets its vocabulary from its tokenizer;
the others are published models, whose weights and tokenizer come from
guide.checkpoint or, by default, from the hub. guide.size='hf' takes whatever
config.json of guide.checkpoint says.
"""

from __future__ import annotations

from exectune_jax.errors import UserError
from exectune_jax.models.transformer import TransformerConfig


def _size(dim, layers, heads, kv_heads, head_dim, mlp_dim, **rest):
  return dict(dim=dim, layers=layers, heads=heads, kv_heads=kv_heads,
              head_dim=head_dim, mlp_dim=mlp_dim, **rest)


def gemma_windows(layers: int, window: int, every: int = 6) -> tuple[int, ...]:
  """Every sixth layer sees everything."""
  return tuple(0 if (i + 1) % every == 0 else window for i in range(layers))


def _smollm2(*shape, theta):
  return _size(*shape, vocab=49_152, rope_theta=theta)


def _llama3(*shape, factor, tied):
  return _size(*shape, vocab=128_256, rope_theta=5e5, tied=tied,
               rope_scaling=('llama3', factor, 1.0, 4.0, 8192))


def _qwen(*shape, vocab=151_936, **rest):
  return _size(*shape, vocab=vocab, rope_theta=1e6, norm_eps=1e-6, **rest)


def _gemma3(*shape, vocab=262_144, window, **rest):
  return _size(*shape, vocab=vocab, rope_theta=1e6, local_rope_theta=1e4,
               norm_eps=1e-6, windows=gemma_windows(shape[1], window),
               qk_norm=True, scale_embeddings=True, norm_plus_one=True,
               post_norms=True, activation='gelu', **rest)


SIZES = {
    'tiny': _size(128, 3, 4, 2, 32, 384),
    'smollm2_135m': _smollm2(576, 30, 9, 3, 64, 1536, theta=1e5),
    'smollm2_360m': _smollm2(960, 32, 15, 5, 64, 2560, theta=1e5),
    'smollm2_1p7b': _smollm2(2048, 24, 32, 32, 64, 8192, theta=1.3e5),
    'qwen2p5_0p5b': _qwen(896, 24, 14, 2, 64, 4864, qkv_bias=True),
    'qwen2p5_1p5b': _qwen(1536, 28, 12, 2, 128, 8960, qkv_bias=True),
    'qwen2p5_3b': _qwen(2048, 36, 16, 2, 128, 11_008, qkv_bias=True),
    'qwen2p5_7b': _qwen(3584, 28, 28, 4, 128, 18_944, qkv_bias=True,
                        vocab=152_064, tied=False),
    'qwen3_0p6b': _qwen(1024, 28, 16, 8, 128, 3072, qk_norm=True),
    'qwen3_1p7b': _qwen(2048, 28, 16, 8, 128, 6144, qk_norm=True),
    'qwen3_4b': _qwen(2560, 36, 32, 8, 128, 9728, qk_norm=True),
    'qwen3_8b': _qwen(4096, 36, 32, 8, 128, 12_288, qk_norm=True, tied=False),
    'llama3p2_1b': _llama3(2048, 16, 32, 8, 64, 8192, factor=32.0, tied=True),
    'llama3p2_3b': _llama3(3072, 28, 24, 8, 128, 8192, factor=32.0, tied=True),
    'llama3p1_8b': _llama3(4096, 32, 32, 8, 128, 14_336, factor=8.0,
                           tied=False),
    'gemma3_270m': _gemma3(640, 18, 4, 1, 256, 2048, window=512),
    'gemma3_1b': _gemma3(1152, 26, 4, 1, 256, 6912, window=512),
    'gemma3_4b': _gemma3(2560, 34, 8, 4, 256, 10_240, window=1024,
                         vocab=262_208, rope_scaling=('linear', 8.0)),
}

HUB = {
    'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
    'smollm2_360m': 'HuggingFaceTB/SmolLM2-360M-Instruct',
    'smollm2_1p7b': 'HuggingFaceTB/SmolLM2-1.7B-Instruct',
    'qwen2p5_0p5b': 'Qwen/Qwen2.5-0.5B-Instruct',
    'qwen2p5_1p5b': 'Qwen/Qwen2.5-1.5B-Instruct',
    'qwen2p5_3b': 'Qwen/Qwen2.5-3B-Instruct',
    'qwen2p5_7b': 'Qwen/Qwen2.5-7B-Instruct',
    'qwen3_0p6b': 'Qwen/Qwen3-0.6B',
    'qwen3_1p7b': 'Qwen/Qwen3-1.7B',
    'qwen3_4b': 'Qwen/Qwen3-4B',
    'qwen3_8b': 'Qwen/Qwen3-8B',
    'llama3p2_1b': 'meta-llama/Llama-3.2-1B-Instruct',
    'llama3p2_3b': 'meta-llama/Llama-3.2-3B-Instruct',
    'llama3p1_8b': 'meta-llama/Llama-3.1-8B-Instruct',
    'gemma3_270m': 'google/gemma-3-270m-it',
    'gemma3_1b': 'google/gemma-3-1b-it',
    'gemma3_4b': 'google/gemma-3-4b-it',
}


def architecture(size: str, **changes) -> TransformerConfig:
  """The named architecture with some fields changed."""
  if size not in SIZES:
    raise UserError(f"guide.size='{size}': choose from {', '.join(SIZES)}, or "
                    "'hf' with guide.checkpoint set to a Hugging Face "
                    'directory')
  return TransformerConfig(**{**SIZES[size], **changes})
