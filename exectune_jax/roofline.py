"""What a step must cost on a chip: floating-point operations, bytes, seconds.

The counts are of what our kernels compute, whole attention squares and
recomputed layers included. A step can't be faster than its largest share of
peak compute, memory bandwidth and interconnect (Williams et al., 2009). XLA's
own estimate counts the body of a loop once, whatever its trip count, so it
can't be used for scanned layers; a test compares the two where no loop is.
"""

from __future__ import annotations

import dataclasses

WIDTH = {'float32': 4, 'bfloat16': 2}  # bytes


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, by the vendor's documents.

  flops: peak bfloat16 operations a second. memory: usable bytes of HBM.
  bandwidth: of HBM, bytes a second. links: what can come in over the
  interconnect, bytes a second. usd_per_hour: on demand, list price of June
  2025 in US regions; yours may differ.
  """
  flops: float
  memory: float
  bandwidth: float
  links: float
  usd_per_hour: float


GIB = 1 << 30
CHIPS = {  # usable memory is what the compiler allows
    'v4': Chip(275e12, 30.75 * GIB, 1.228e12, 300e9, 3.22),
    'v5e': Chip(197e12, 15.75 * GIB, 0.819e12, 200e9, 1.20),
    'v5p': Chip(459e12, 95.74 * GIB, 2.765e12, 600e9, 4.20),
    'v6e': Chip(918e12, 31.25 * GIB, 1.638e12, 400e9, 2.70),
}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one step, per chip: operations, HBM bytes, interconnect bytes."""
  flops: float
  bytes: float
  linked: float = 0.0

  def __add__(self, other):
    return Cost(self.flops + other.flops, self.bytes + other.bytes,
                self.linked + other.linked)

  def times(self, factor: float) -> Cost:
    return Cost(*(factor * x for x in dataclasses.astuple(self)))

  def seconds(self, chip: Chip) -> tuple[float, str]:
    """(least seconds, what bounds them)."""
    shares = {'compute': self.flops / chip.flops,
              'memory': self.bytes / chip.bandwidth,
              'links': self.linked / chip.links}
    bound = max(shares, key=shares.get)
    return shares[bound], bound


def layer_weights(c) -> int:
  """Weights in the matrices of all layers of a TransformerConfig."""
  attention = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
  return c.layers * (attention + 3 * c.dim * c.mlp_dim)


def forward_flops(c, rows: int, length: int) -> float:
  """Operations of the layers on rows of some length, without the head."""
  products = 2 * layer_weights(c) * rows * length
  scores = 4 * c.layers * c.heads * c.head_dim * rows * length ** 2
  return products + scores


def head_flops(c, tokens: int) -> float:
  return 2 * c.dim * c.vocab * tokens


def train_step(c, rows: int, length: int, slots: int, micro_batches: int,
               chips: int, fsdp: int, tensor: int, trained: int) -> Cost:
  """One update.

  Twice the forward operations go backwards, once more where a layer's
  activations are recomputed; the head is always recomputed. Per micro-batch
  every weight is read in each pass and its gradient is added to; the
  optimizer reads and writes weight and two moments in float32. Slices of
  weights come in over the links for each pass in the compute dtype, and
  gradients go out once in float32.

  Args:
    c: TransformerConfig.
    rows, length, slots: of the batch (tokens_BL and slots a row).
    micro_batches: how many parts it is computed in.
    chips: over which the work is spread.
    fsdp, tensor: of the mesh.
    trained: number of trained weights.
  """
  passes = 3 + (c.remat == 'full')
  flops = (passes * forward_flops(c, rows, length)
           + 4 * head_flops(c, rows * slots)) / chips
  width, copies = WIDTH[c.dtype], fsdp * tensor
  weights = (layer_weights(c) + c.dim * c.vocab) / tensor
  # x in and out of each matrix, in each pass
  wide = c.dim * 6 + c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.mlp_dim
  activations = passes * width * c.layers * wide * rows * length / chips
  bytes_ = (micro_batches * (passes * width * weights + 12 * trained / copies)
            + 24 * trained / copies + activations)
  linked = 0.0
  if fsdp > 1:
    linked = micro_batches * (passes * width * weights + 4 * trained / tensor
                              ) * (fsdp - 1) / fsdp
  if chips > copies:  # gradients are also summed over data
    linked += 2 * 4 * trained / copies
  return Cost(flops, bytes_, linked)


def prefill(c, prompts: int, length: int, **mesh) -> Cost:
  """Keys and values of prompts, and their first logits."""
  flops = forward_flops(c, prompts, length) + head_flops(c, prompts)
  return _read(c, flops, 0.0, **mesh)


def decode_token(c, prompts: int, group: int, length: int, new: int,
                 int8: bool, **mesh) -> Cost:
  """One token of every sample: all weights and caches are read once."""
  samples = prompts * group
  flops = (2 * layer_weights(c) * samples + head_flops(c, samples)
           + 4 * c.layers * c.heads * c.head_dim * samples * (length + new))
  width = 1 if int8 else WIDTH[c.dtype]
  cache = (2 * c.layers * c.kv_heads * c.head_dim * width
           * (prompts * length + samples * new))
  return _read(c, flops, cache, **mesh)


def _read(c, flops, cache, chips: int, fsdp: int, tensor: int) -> Cost:
  """A forward pass whose weights come from HBM, or from other chips."""
  weights = WIDTH[c.dtype] * (layer_weights(c) + c.dim * c.vocab) / tensor
  return Cost(flops / chips, weights + cache / chips,
              weights * (fsdp - 1) / fsdp)
