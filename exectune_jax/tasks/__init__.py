"""Task families by name."""

from __future__ import annotations

import importlib

from exectune_jax.errors import UserError

BUILT_IN = {
    'word_problems': 'exectune_jax.tasks.word_problems:WordProblems',
    'gsm8k': 'exectune_jax.tasks.gsm8k:GSM8K',
    'svamp': 'exectune_jax.tasks.svamp:SVAMP',
    'word_programs': 'exectune_jax.tasks.word_programs:WordPrograms',
    'humaneval': 'exectune_jax.tasks.humaneval:HumanEval',
    'mbpp': 'exectune_jax.tasks.mbpp:MBPP',
    'mbpp_sanitized': 'exectune_jax.tasks.mbpp:SanitizedMBPP',
    'kodcode': 'exectune_jax.tasks.kodcode:KodCode',
    'jsonl': 'exectune_jax.tasks.jsonl:JsonLines',
}


def make_task(options, shots: int = 0):
  """The task that `config.task` names: a built-in, or 'module:Class'."""
  where = BUILT_IN.get(options.name, options.name)
  module, _, name = where.partition(':')
  try:
    return getattr(importlib.import_module(module), name)(options, shots)
  except (ImportError, AttributeError, ValueError) as e:
    if options.name in BUILT_IN:
      raise
    raise UserError(f"task.name='{options.name}': {e}; choose from "
                    f"{', '.join(BUILT_IN)}, or write 'module:Class'") from e


def load_problems(task, split: str):
  """Problems of a split; an empty one is an error, not an empty report."""
  problems = task.problems(split)
  if not problems:
    raise UserError(f"task.name='{task.options.name}': split '{split}' is "
                    f'empty; check task.{split}_size and task.data_dir')
  return problems


def transfer(config):
  """(task options, split) of the task that is evaluated but never trained."""
  options = config.task.copy_and_resolve_references()
  options.update(name=config.evaluate.transfer,
                 data_dir=config.evaluate.transfer_data_dir,
                 max_number=config.evaluate.transfer_max_number)
  # All of svamp is free for this; other tasks keep their splits.
  return options, ('all' if options.name == 'svamp'
                   else config.evaluate.split)
