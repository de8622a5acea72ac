"""The tokenizer of guides that are trained from scratch.

A byte-level BPE learned from the project's own word problems: any text can
be encoded, small numbers and common words are single tokens.
"""

from __future__ import annotations

import pathlib
import random

import tokenizers
import transformers

from exectune_jax import strategy, teachers
from exectune_jax.config import default_config
from exectune_jax.tasks.word_problems import FAMILIES, WordProblems

PAD, END = '<pad>', '<end>'
# Role lines are cheap: the guide sees one system and one user message.
_CHAT = ("{% for m in messages %}{% if m['role'] == 'user' %}"
         "{{ m['content'] }}\n{% endif %}{% endfor %}")


def build(vocab: int = 1024) -> transformers.PreTrainedTokenizerFast:
  """Learns the tokenizer; the result is the same every time."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab, special_tokens=[PAD, END], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  bpe.train_from_iterator(_texts(), trainer)
  bpe.add_tokens([strategy.OPEN, strategy.CLOSE])
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe, pad_token=PAD, eos_token=END)
  fast.chat_template = _CHAT
  return fast


def load(directory: str | pathlib.Path):
  """The tokenizer of a Hugging Face directory."""
  return transformers.AutoTokenizer.from_pretrained(str(directory))


def _texts(count: int = 3000):
  options = default_config().task
  with options.unlocked():
    options.update(families=FAMILIES, train_size=count)
  rng, weights = random.Random(0), default_config().collect.styles
  styles = [s for s in teachers.STYLES if weights[s]]
  for problem in WordProblems(options).problems('train'):
    yield f'Problem: {problem.question}\n'
    yield teachers.write(problem, rng.choice(styles), rng)
