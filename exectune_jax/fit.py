"""Does a config fit a TPU, and what will it cost? Needs no TPU.

  python -m exectune_jax.fit --config configs/gsm8k.py --topology v6e:2x4

Compiles the programs of the config for the named topology (libtpu does so on
any machine: pip install -e '.[tpu]'), at their largest shapes, and
prints per chip: memory against what the chip has, operations, bytes, the
roofline time, and dollars per 1,000 steps at that time. Real steps take
longer, and RL steps wait for the core as well. Exit code 1: it does not fit.
"""

from __future__ import annotations

import dataclasses
import os
import re

from absl import flags
from rich.table import Table

from exectune_jax import config as config_lib
from exectune_jax import main as entry
from exectune_jax import progress, roofline
from exectune_jax.errors import UsageError, UserError

_TOPOLOGY = flags.DEFINE_string(
    'topology', 'v6e:2x4', 'TPU chips and their arrangement, as in v5e:2x4.')


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program, per chip.

  needs: bytes while it runs, with everything else that stays; inf if the
    compiler gave up. cost: by roofline.py. times: how often a step runs it.
  """
  name: str
  needs: float
  parts: dict[str, float]
  cost: roofline.Cost
  times: int


def main(argv):
  if len(argv) > 1 or entry.CONFIG.value is None:
    raise UsageError('use python -m exectune_jax.fit --config configs/x.py '
                     '--topology v6e:2x4')
  config = entry.CONFIG.value
  config_lib.validate(config)
  chip, devices = topology(_TOPOLOGY.value)
  programs = compile_all(config, chip, devices)
  fits = report(programs, config, chip, _TOPOLOGY.value, len(devices))
  return 0 if fits else 1


def topology(name: str):
  """(Chip, abstract devices) of a topology such as 'v5e:2x4'."""
  kind = name.partition(':')[0]
  if kind not in roofline.CHIPS:
    raise UserError(f"--topology='{name}': choose chips from "
                    f'{", ".join(roofline.CHIPS)}, as in v5e:2x4')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # Only the compiler is used: another process may have libtpu, or the chips.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  from jax.experimental import topologies
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except Exception as e:  # noqa: BLE001 jaxlib raises its own classes
    text = str(e).splitlines()[0][:200]
    raise UserError(f"--topology='{name}': {text}; name an arrangement that "
                    "exists, such as 2x4, and pip install -e '.[tpu]'"
                    ) from e
  return roofline.CHIPS[kind], list(found.devices)


def compile_all(config, chip, devices) -> list[Program]:
  """The programs of the stages sft and rl, at their largest shapes."""
  import jax

  from exectune_jax.learning import sharding, steps
  from exectune_jax.learning.batches import bucket
  from exectune_jax.models.transformer import Transformer
  from exectune_jax.sampling.sampler import Sampler

  if config.mesh.mode != 'pjit':
    raise UserError(f"mesh.mode='{config.mesh.mode}': fit compiles for "
                    "mesh.mode='pjit'")
  c = architecture(config)
  mesh = sharding.make_mesh(config.mesh, devices)
  model = Transformer(c, mesh)
  tx = steps.optimizer(config.optim, 1e-5, 1)
  shapes, where = steps.state_shardings(model, tx, mesh)
  state = sharding.place(shapes, where)
  trained = sum(x.size for x in jax.tree.leaves(shapes.params))
  spread = dict(chips=len(devices), fsdp=mesh.shape['fsdp'],
                tensor=mesh.shape['tensor'])
  prompt, new = config.guide.max_prompt_tokens, config.guide.max_new_tokens
  sft, rl = config.sft, config.rl
  found = []
  _check_state(_bytes(state), chip, config)

  def train(name, step, rows, length, slots, parts, extra=()):
    batch = abstract_batch(rows, length, slots, extra, mesh)
    compiled = _compile(name, lambda: steps.compile_step(
        step, mesh, where, config.mesh.mode).lower(state, batch))
    found.append(_measure(name, compiled, 0, roofline.train_step(
        c, rows, length, slots, parts, trained=trained, **spread), 1))

  length = sft.row_length or bucket(prompt + new, 16)
  slots = bucket(length if sft.row_length else new, 16)
  train('sft step', steps.sft_step(model, tx, sft.micro_batch),
        sft.batch_size, length, slots,
        sft.batch_size // (sft.micro_batch or sft.batch_size))
  members = rl.group_size if rl.share_prompt else 1
  rows = rl.groups * rl.group_size // members
  micro = rl.micro_batch * rl.group_size // members
  extra = ['sampler_logp_BT', 'advantage_BT']
  extra += ['reference_logp_BT'] * bool(rl.kl)
  extra += ['prefix_BL'] * (members > 1)
  train('grpo step', steps.grpo_step(
      model, tx, clip_low=rl.clip_low, clip_high=rl.clip_high,
      tis_cap=rl.tis_cap, temperature=rl.temperature, kl=rl.kl,
      micro_batch=micro), rows, bucket(prompt + members * new, 16),
        bucket(members * new, 16), rl.groups // (rl.micro_batch or rl.groups),
        extra)

  width, gather = bucket(prompt, 32), config.mesh.gather_to_sample
  lowered = Sampler(
      model, 0, new, mesh, int8=config.guide.int8_cache, gather=gather).lower(
          shapes.variables, rl.groups, rl.group_size, width)
  cut = dict(chips=len(devices), tensor=mesh.shape['tensor'],
             fsdp=1 if gather else mesh.shape['fsdp'])
  # Training state waits on the chip while strategies are sampled.
  resident = _bytes(state) + (_bytes(state.variables) if rl.kl else 0)
  found.append(_measure(
      'prefill', _compile('prefill', lambda: lowered['prefill']), resident,
      roofline.prefill(c, rl.groups, width, **cut), 1))
  found.append(_measure(
      'decode, a token', _compile('decode', lambda: lowered['decode']),
      resident, roofline.decode_token(
          c, rl.groups, rl.group_size, width, new // 2,
          int8=config.guide.int8_cache, **cut), new))
  return found


def _check_state(held: float, chip, config) -> None:
  """Spares a long compilation whose end is known."""
  if held > chip.memory:
    raise UserError(
        f'mesh.fsdp={config.mesh.fsdp}: it does not fit: weights and optimizer '
        f'alone take {held / roofline.GIB:.1f} of {chip.memory / roofline.GIB}'
        ' GiB per chip; raise mesh.fsdp and lower mesh.data, use more chips, '
        'or train adapters (guide.lora_rank=16)')


def architecture(config):
  """TransformerConfig of the guide, computed as on a TPU."""
  from exectune_jax.models import guide, hf, tokenizer, zoo
  changes = guide.settings(config, 'tpu')
  if config.guide.size == 'hf':
    return hf.read_config(guide.source(config), **changes)
  if config.guide.size == 'tiny':
    changes['vocab'] = len(tokenizer.build())
  return zoo.architecture(config.guide.size, **changes)


def abstract_batch(rows, length, slots, extra, mesh) -> dict:
  """Shapes of what `batches.lay_out` makes."""
  import jax
  import jax.numpy as jnp

  from exectune_jax.learning import sharding
  def array(width, dtype):
    return jax.ShapeDtypeStruct((rows, width), dtype,
                                sharding=sharding.rows(mesh))
  names = ('tokens_BL', 'positions_BL', 'segments_BL', 'where_BT',
           'target_BT', 'mask_BT', *extra)
  floats = ('mask_BT', 'sampler_logp_BT', 'advantage_BT', 'reference_logp_BT')
  return {n: array(length if n.endswith('L') else slots,
                   jnp.float32 if n in floats else jnp.int32) for n in names}


def _compile(name, lower):
  """The compiled program, or the compiler's own word on its memory."""
  progress.console.print(f'compiling {name} ...')
  try:
    return lower().compile()
  except Exception as e:  # noqa: BLE001 jaxlib raises its own classes
    if 'memory' not in str(e).lower():
      raise
    return str(e)


def _measure(name, compiled, resident, cost, times) -> Program:
  if isinstance(compiled, str):
    used = re.search(r'Used ([\d.]+)([GM]) of', compiled)
    bytes_ = float('inf') if not used else float(used[1]) * (
        roofline.GIB if used[2] == 'G' else roofline.GIB / 1024)
    return Program(name, bytes_ + resident, {'total': bytes_}, cost, times)
  m = compiled.memory_analysis()
  parts = {'arguments': m.argument_size_in_bytes,
           'results': m.output_size_in_bytes - m.alias_size_in_bytes,
           'scratch': m.temp_size_in_bytes,
           'code': m.generated_code_size_in_bytes}
  return Program(name, sum(parts.values()) + resident, parts, cost, times)


def _bytes(tree) -> float:
  """Bytes of abstract arrays on one chip."""
  import jax
  import numpy as np
  return float(sum(
      np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)))


def report(programs, config, chip, name, count) -> bool:
  """Prints the tables and the advice; True if everything fits."""
  gib = roofline.GIB
  table = Table(title=f'{config.guide.size} on {name}, per chip')
  for column in ('program', 'memory GiB', 'of', 'TFLOP', 'GB read or written',
                 'GB over links', 'bound by', 'at least ms'):
    table.add_column(column, justify='left' if column in (
        'program', 'bound by') else 'right')
  for p in programs:
    seconds, bound = p.cost.seconds(chip)
    table.add_row(
        p.name, f'{p.needs / gib:.2f}', f'{chip.memory / gib:.2f}',
        f'{p.cost.flops / 1e12:.3f}', f'{p.cost.bytes / 1e9:.2f}',
        f'{p.cost.linked / 1e9:.2f}', bound, f'{1e3 * seconds:.2f}')
  progress.console.print(table)
  sft, *rl = programs
  for title, part in (('sft', [sft]), ('rl', rl)):
    seconds = sum(p.times * p.cost.seconds(chip)[0] for p in part)
    usd = 1000 * seconds * count * chip.usd_per_hour / 3600
    progress.console.print(
        f'{title}: at least {seconds:.3f} s a step, ${usd:.2f} per 1,000 steps '
        f'({count} chips at ${chip.usd_per_hour:.2f} an hour, list price of '
        'June 2025)')
  too_big = [p for p in programs if p.needs > chip.memory]
  for p in too_big:
    progress.console.print(f'{p.name} does not fit: {advice(p, config, chip)}')
  if not too_big:
    progress.console.print('It fits.')
  return not too_big


def advice(p: Program, config, chip) -> str:
  """What to change, most effective first."""
  tips = []
  held = p.parts.get('arguments', 0)
  if held > chip.memory / 2 or 'total' in p.parts:
    tips.append('spread the weights (raise mesh.fsdp, lower mesh.data), more '
                'chips, or train adapters (guide.lora_rank=16)')
  if p.name == 'sft step':
    tips.append(f'compute fewer rows at a time (sft.micro_batch, now '
                f'{config.sft.micro_batch})')
  elif p.name == 'grpo step':
    tips.append(f'compute fewer problems at a time (rl.micro_batch, now '
                f'{config.rl.micro_batch})')
  else:
    tips.append('fewer rl.groups, guide.int8_cache=True, or shorter '
                'guide.max_new_tokens')
  if 'step' in p.name and config.guide.remat != 'full':
    tips.append("guide.remat='full'")
  if config.guide.compute_dtype != 'bfloat16':
    tips.append("guide.compute_dtype='bfloat16'")
  return '; '.join(tips)


if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  entry.run(main)
