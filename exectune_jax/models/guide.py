"""A guide: architecture, tokenizer and where its first weights come from."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import transformers

from exectune_jax import prompts, strategy
from exectune_jax.episode import Problem, Strategy
from exectune_jax.errors import UserError
from exectune_jax.models import hf, tokenizer, zoo
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_params)


@dataclasses.dataclass(frozen=True)
class Guide:
  """Everything about a guide but its parameters.

  max_prompt_tokens: longer prompts are cut from the left.
  """
  model: Transformer
  tokenizer: transformers.PreTrainedTokenizerFast
  max_prompt_tokens: int
  max_new_tokens: int

  @property
  def config(self) -> TransformerConfig:
    return self.model.config

  @property
  def end(self) -> int:
    return self.tokenizer.eos_token_id

  def prompt(self, problem: Problem) -> list[int]:
    """Token ids of the prompt, through the tokenizer's chat template."""
    messages = [{'role': r, 'content': t}
                for r, t in prompts.guide_messages(problem.question)]
    ids = self.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)
    return list(ids)[-self.max_prompt_tokens:]

  def target(self, text: str) -> list[int]:
    """Token ids that the guide should write, with the end token."""
    ids = self.tokenizer.encode(text, add_special_tokens=False)
    return [*ids, self.end]

  def read(self, tokens, logprobs, complete: bool) -> Strategy:
    """The strategy in sampled tokens."""
    text = self.tokenizer.decode(
        [t for t in tokens if t != self.end], skip_special_tokens=False,
        clean_up_tokenization_spaces=False)
    return strategy.parse(text, tokens, logprobs, complete)


def load(config, workdir: pathlib.Path) -> Guide:
  """The guide that `config.guide` describes."""
  g = config.guide
  changes = dict(dtype=g.compute_dtype, remat=g.remat)
  if g.size == 'hf':
    architecture = hf.read_config(g.checkpoint, **changes)
    words = tokenizer.load(g.checkpoint)
    if words.chat_template is None:
      raise UserError(f"guide.checkpoint='{g.checkpoint}': its tokenizer has "
                      'no chat template; use an instruct checkpoint')
  else:
    words = _own_tokenizer(workdir)
    architecture = zoo.architecture(g.size, **changes, vocab=len(words))
  return Guide(Transformer(architecture), words, g.max_prompt_tokens,
               g.max_new_tokens)


def first_params(config, guide: Guide, key: jax.Array, shardings):
  """Weights before any training: from the checkpoint, or random."""
  if config.guide.size == 'hf':
    return jax.device_put(hf.read_params(config.guide.checkpoint,
                                         guide.config), shardings)
  make = functools.partial(init_params, guide.model)
  return jax.jit(make, out_shardings=shardings)(key)


def _own_tokenizer(workdir):
  directory = workdir / 'tokenizer'
  if not (directory / 'tokenizer.json').exists():
    tokenizer.build().save_pretrained(directory)
  return tokenizer.load(directory)


def describe(guide: Guide) -> dict:
  """What must agree before a checkpoint may be loaded into this guide."""
  fields = dataclasses.asdict(guide.config)
  return {k: v for k, v in fields.items() if k not in ('dtype', 'remat')}


def claim(guide: Guide, directory: pathlib.Path) -> None:
  """Marks `directory` as holding weights of this guide's architecture.

  Raises:
    UserError: it holds weights of another one.
  """
  path = directory / 'guide.json'
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(describe(guide), indent=2) + '\n')
    return
  held = json.loads(path.read_text())
  for field, value in describe(guide).items():
    if held.get(field) != value:
      raise UserError(f'{directory}: checkpoint of another model: {field}='
                      f'{held.get(field)!r}, the config says {value!r}; use '
                      'the guide.size of that run, or another --workdir')
