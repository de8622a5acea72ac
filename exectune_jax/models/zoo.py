"""Named sizes of guides that are trained from scratch, whose vocabulary comes
from their tokenizer. Pretrained guides bring their own: guide.size='hf'."""

from exectune_jax.errors import UserError
from exectune_jax.models.transformer import TransformerConfig

SIZES = {
    'tiny': dict(dim=128, layers=3, heads=4, kv_heads=2, head_dim=32,
                 mlp_dim=384, rope_theta=10_000.0),
}


def architecture(size: str, **changes) -> TransformerConfig:
  """The named architecture with some fields changed."""
  if size not in SIZES:
    raise UserError(f"guide.size='{size}': choose from {', '.join(SIZES)}, or "
                    "'hf' with guide.checkpoint set to a Hugging Face "
                    'directory')
  return TransformerConfig(**{**SIZES[size], **changes})
