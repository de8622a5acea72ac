"""A guide: architecture, tokenizer and where its first weights come from."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import pathlib
import re

import jax
import transformers

from exectune_jax import files, progress, prompts, strategy
from exectune_jax.episode import Problem, Strategy
from exectune_jax.errors import UserError
from exectune_jax.learning import hosts
from exectune_jax.models import attention, hf, tokenizer, zoo
from exectune_jax.models.transformer import (Transformer, TransformerConfig,
                                             init_variables)


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
    """Token ids of the prompt, at most max_prompt_tokens."""
    ids = self.whole_prompt(problem)
    if len(ids) > self.max_prompt_tokens:
      progress.warn_once(
          'guide.max_prompt_tokens',
          f'guide.max_prompt_tokens={self.max_prompt_tokens}: a prompt of '
          f'{len(ids)} tokens loses its beginning; others may, too')
    return ids[-self.max_prompt_tokens:]

  def whole_prompt(self, problem: Problem) -> list[int]:
    """Token ids of the prompt, through the tokenizer's chat template."""
    messages = [{'role': r, 'content': t}
                for r, t in prompts.guide_messages(problem.question)]
    ids = self.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False,
        enable_thinking=False)  # Qwen3: strategies without a monologue
    return list(ids)

  def target(self, text: str) -> list[int]:
    """Token ids that the guide should write, with the end token."""
    ids = self.tokenizer.encode(text, add_special_tokens=False)
    return [*ids, self.end]

  def read(self, tokens, logprobs, complete: bool) -> Strategy:
    """The strategy in sampled tokens."""
    return strategy.parse(self.text(tokens), tokens, logprobs, complete)

  def text(self, tokens) -> str:
    return self.tokenizer.decode(
        [t for t in tokens if t != self.end], skip_special_tokens=False,
        clean_up_tokenization_spaces=False)

  def stop_at(self, tokens) -> int | None:
    """How many tokens reach the end of a strategy; None: not yet there."""
    if strategy.CLOSE not in self.text(tokens):
      return None
    return bisect.bisect_left(
        range(1, len(tokens) + 1), True,
        key=lambda n: strategy.CLOSE in self.text(tokens[:n])) + 1


def load(config, workdir: pathlib.Path, mesh=None) -> Guide:
  """The guide that `config.guide` describes, to be used on a mesh."""
  g = config.guide
  changes = settings(config, jax.default_backend())
  if g.size == 'tiny':
    words = _own_tokenizer(workdir)
    found = zoo.architecture(g.size, **changes, vocab=len(words))
  else:
    directory = source(config)
    found = hf.read_config(directory, **changes)
    if g.size != 'hf':
      _same(zoo.architecture(g.size, **changes), found, directory)
    words = tokenizer.load(directory)
    if words.chat_template is None:
      raise UserError(f"guide.checkpoint='{directory}': its tokenizer has no "
                      'chat template; use an instruct checkpoint')
  return Guide(Transformer(found, mesh), words, g.max_prompt_tokens,
               g.max_new_tokens)


def settings(config, platform: str) -> dict:
  """Fields of TransformerConfig that the config decides, not the model."""
  g = config.guide
  return dict(dtype=g.compute_dtype, remat=g.remat,
              attention=attention.choose(g.attention, platform,
                                         g.compute_dtype),
              lora_rank=g.lora_rank, lora_alpha=g.lora_alpha,
              lora_targets=g.lora_targets)


def origin(config) -> str:
  """Directory or hub name that first weights come from; '' if from none."""
  g = config.guide
  return '' if g.size == 'tiny' else g.checkpoint or zoo.HUB.get(g.size, '')


def source(config) -> pathlib.Path:
  """Directory of a pretrained guide, downloaded if it is a name on the hub."""
  g, name = config.guide, origin(config)
  if not name:
    raise UserError(f"guide.size='{g.size}': set guide.checkpoint to a Hugging "
                    'Face directory or model name, or choose from '
                    f'{", ".join(zoo.SIZES)}')
  path = pathlib.Path(name).expanduser()
  if path.exists() or not re.fullmatch(r'[\w.-]+/[\w.-]+', name):
    return path
  import huggingface_hub
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        name, allow_patterns=['*.json', '*.safetensors', '*.jinja']))
  except Exception as e:  # noqa: BLE001 offline, gated, unknown: many classes
    raise UserError(f"guide.checkpoint='{name}': neither a directory nor to be "
                    f'had from the hub ({type(e).__name__}); download it '
                    'elsewhere and give its directory') from e


def _same(named, found, directory):
  """A checkpoint must be of the size that the config names."""
  for field in dataclasses.fields(named):
    a, b = getattr(named, field.name), getattr(found, field.name)
    if a != b:
      raise UserError(f"guide.checkpoint='{directory}': {field.name}={b!r}, "
                      f"but guide.size says {a!r}; use guide.size='hf' to "
                      'take what the checkpoint says')


def first_variables(config, guide: Guide, key: jax.Array, shapes, shardings):
  """Variables before any training: from the checkpoint, or random."""
  make = functools.partial(init_variables, guide.model)
  if config.guide.size == 'tiny':
    return jax.jit(make, out_shardings=shardings)(key)
  params = hf.read_params(source(config), guide.config, shapes['params'],
                          shardings['params'])
  if 'lora' not in shapes:
    return {'params': params}
  lora = jax.jit(lambda key: make(key)['lora'],
                 out_shardings=shardings['lora'])(key)
  return {'params': params, 'lora': lora}


def _own_tokenizer(workdir):
  directory = workdir / 'tokenizer'
  if hosts.first() and not (directory / 'tokenizer.json').exists():
    tokenizer.build().save_pretrained(directory)
  hosts.barrier('tokenizer')
  return tokenizer.load(directory)


def describe(guide: Guide) -> dict:
  """What must agree before a checkpoint may be loaded into this guide."""
  fields = json.loads(json.dumps(dataclasses.asdict(guide.config)))
  return {k: v for k, v in fields.items()
          if k not in ('dtype', 'remat', 'attention')}


def claim(guide: Guide, directory: pathlib.Path) -> None:
  """Marks `directory` as holding weights of this guide's architecture.

  Raises:
    UserError: it holds weights of another one.
  """
  path = directory / 'guide.json'
  if not path.exists():
    if not hosts.first():
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(describe(guide), indent=2) + '\n')
    return
  held = json.loads(path.read_text())
  for field, value in describe(guide).items():
    if held.get(field) != value:
      raise UserError(f'{directory}: checkpoint of another model: {field}='
                      f'{held.get(field)!r}, the config says {value!r}; use '
                      'the guide.size of that run, or another --workdir')
