"""The whole recipe in a few minutes on a laptop: no key, no network.

  make quickstart
  python -m exectune_jax.main --config configs/quickstart.py \
      --workdir runs/quickstart
"""

from exectune_jax.config import default_config, parse_arg, runlocal


def get_config(arg=''):
  arg = parse_arg(arg, runlocal=False)
  config = default_config()
  config.task.families = ('one_step', 'units', 'two_step')
  config.task.max_number = 12
  config.task.wordings = 2
  config.task.train_size = 6000
  config.guide.max_prompt_tokens = 64
  config.guide.max_new_tokens = 32
  config.collect.problems = 2500
  config.sft.base_steps = 250
  config.sft.steps = 60
  config.sft.examples = 300
  config.rl.steps = 60
  return runlocal(config) if arg.runlocal else config
