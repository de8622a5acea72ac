"""Python programs: MBPP for training, HumanEval as the transfer test.

One TPU VM with 8 chips, as configs/gsm8k.py. A starting point: it has not
been run by us with these cores.

  export GEMINI_API_KEY=...
  python -m exectune_jax.main --workdir runs/code --config.budget_usd=20 \
      --config configs/code.py:core=gemini:gemini-2.5-flash-lite

Programs run in bubblewrap (apt-get install bubblewrap). Arguments: task
(mbpp, mbpp_sanitized, or kodcode with task.data_dir), core, teacher, guide
and runlocal: a smoke run on word_programs with the toy core. MBPP and
HumanEval are downloaded from upstream, or read from task.data_dir and
evaluate.transfer_data_dir.
"""

from configs import gsm8k
from exectune_jax.config import parse_arg, runlocal


def get_config(arg=''):
  arg = parse_arg(arg, runlocal=False, task='mbpp',
                  core='gemini:gemini-2.5-flash-lite',
                  teacher='gemini:gemini-2.5-pro', guide='qwen3_1p7b')
  config = gsm8k.get_config(
      f'core={arg.core},teacher={arg.teacher},guide={arg.guide}')
  config.task.name = arg.task
  config.guide.max_prompt_tokens = 512
  config.collect.problems = 370  # MBPP has 374 to train on
  config.evaluate.transfer = 'humaneval'
  if arg.runlocal:
    runlocal(config)
    config.task.name = 'word_programs'
  return config
