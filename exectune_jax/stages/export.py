"""A trained guide as a Hugging Face directory, for transformers, vLLM, ....

Adapters are merged, or kept for peft. Leaves export/<guide> (or
export.output) with config.json, safetensors files, tokenizer with chat
template, generation config, and a model card with what report.json says of
the guide.
"""

from __future__ import annotations

import json
import pathlib

import transformers

from exectune_jax import progress
from exectune_jax.errors import UserError
from exectune_jax.learning import hosts
from exectune_jax.learning.learner import Learner
from exectune_jax.models import guide as guides
from exectune_jax.models import hf, lora
from exectune_jax.report import card


def run(config, workdir):
  """Runs the stage; see the module docstring."""
  name = config.export.guide
  output = pathlib.Path(config.export.output).expanduser() if (
      config.export.output) else workdir / 'export' / name
  learner = Learner(config, workdir, config.rl)
  variables = learner.weights(name, 'export.guide')
  guide = learner.guide
  dtype = config.export.dtype or _dtype(config)
  words = guide.tokenizer
  ends = {'bos_token_id': words.bos_token_id,
          'eos_token_id': words.eos_token_id,
          'pad_token_id': words.pad_token_id}
  keep = config.export.lora == 'keep'
  if keep:
    _check_adapters(config, variables)
    lora.write(output, variables['lora'], guide.config,
               guides.origin(config))
  else:
    hf.write(output, guide.config, lora.merge(variables, guide.config), dtype,
             ends)
  if hosts.first():
    words.save_pretrained(output)
    transformers.GenerationConfig(
        do_sample=False, max_new_tokens=guide.max_new_tokens,
        **ends).save_pretrained(output)
    report = card.read_report(workdir / 'report.json')
    (output / 'README.md').write_text(
        card.write(name, config, guides.origin(config), report))
  progress.console.print(
      f'written: {output} ({name}, {"adapters" if keep else dtype}); load it '
      f'with {"peft.AutoPeft" if keep else "transformers.Auto"}'
      'ModelForCausalLM.from_pretrained')


def _check_adapters(config, variables) -> None:
  if 'lora' not in variables:
    raise UserError("export.lora='keep': this guide has no adapters "
                    "(guide.lora_rank=0); use export.lora='merge'")
  if not guides.origin(config):
    raise UserError(f"export.lora='keep': guide.size='{config.guide.size}' "
                    'began from random weights, which nobody else has; use '
                    "export.lora='merge'")


def _dtype(config) -> str:
  """What the checkpoint that training began from is stored in."""
  if config.guide.size == 'tiny':
    return 'float32'
  raw = json.loads((guides.source(config) / 'config.json').read_text())
  raw = raw.get('text_config', raw)
  stored = raw.get('dtype') or raw.get('torch_dtype') or 'float32'
  return stored if stored in hf.DTYPES else 'float32'
