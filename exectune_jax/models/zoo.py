"""Named guide sizes. `tiny` is trained from scratch; its vocabulary comes
from its tokenizer."""

from exectune_jax.errors import UserError
from exectune_jax.models.transformer import TransformerConfig

SIZES = {
    'tiny': dict(dim=128, layers=3, heads=4, kv_heads=2, head_dim=32,
                 mlp_dim=384, rope_theta=10_000.0),
    'smollm2-135m': dict(vocab=49_152, dim=576, layers=30, heads=9, kv_heads=3,
                         head_dim=64, mlp_dim=1536, rope_theta=100_000.0),
}


def architecture(size: str, **changes) -> TransformerConfig:
  """The named architecture with some fields changed."""
  if size not in SIZES:
    raise UserError(f"guide.size='{size}': choose from {', '.join(SIZES)}, or "
                    "'hf' with guide.checkpoint set to a Hugging Face "
                    'directory')
  return TransformerConfig(**{**SIZES[size], **changes})
