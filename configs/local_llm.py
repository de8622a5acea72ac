"""The recipe with a real language model as core and a real one as guide.

Core: SmolLM2-135M-Instruct (8-bit, re-encoded from a 4-bit file) on
llama.cpp's server. Guide: the same model in Flax, trained here; LOG.md's runs
began with the 4-bit file's weights, OFFLINE=1 makes local_guide.sh take those
where it could reach the hub. 100 minutes on 2 CPU cores.

  launch/local_guide.sh runs/smollm2            # guide.checkpoint
  launch/local_core.sh start                    # the core, on port 8080
  python -m exectune_jax.main --config configs/local_llm.py \
      --workdir runs/local_llm
  launch/local_core.sh stop

Problems: word_problems, one step with an irrelevant number and unit
conversion, numbers up to 9, + and * only: on training problems this core got
3 of 11 subtractions right even with the bare expression as strategy.

Transfer, never trained on: --config.evaluate.transfer=svamp together with
--config.evaluate.transfer_data_dir (a directory with upstream's SVAMP.json
as svamp.json) adds SVAMP problems with numbers up to 12. Prices are
notional: a local core has none.
"""

from exectune_jax.config import default_config, parse_arg, runlocal


def get_config(arg=''):
  arg = parse_arg(arg, runlocal=False)
  config = default_config()
  config.task.families = ('one_step', 'units')
  config.task.operations = '+*'
  config.task.max_number = 9
  config.task.wordings = 2
  config.task.train_size = 1000

  config.core.name = 'openai:smollm2@http://127.0.0.1:8080/v1'
  config.core.shots = 2
  config.core.max_tokens = 64
  config.core.concurrency = 8
  config.core.usd_per_1m_input = 0.01
  config.core.usd_per_1m_output = 0.02

  config.guide.size = 'hf'
  config.guide.checkpoint = 'runs/smollm2'
  config.guide.max_new_tokens = 32
  config.guide.usd_per_1m_tokens = 0.01

  # The teacher can't know which form of an expression this core obeys best;
  # it must offer several, or RL has nothing to choose from.
  config.collect.styles.update(steps=0.0, expression=0.0, named=0.1,
                               verbal=0.15, wrong=0.1, reveals=0.05, loose=0.6)
  config.collect.problems = 240
  config.collect.max_revisions = 2
  config.sft.batch_size = 16
  config.sft.micro_batch = 8
  config.sft.learning_rate = 5e-5
  config.sft.warmup_steps = 5
  config.sft.base_steps = 30
  config.sft.steps = 15

  config.rl.groups = 5
  config.rl.group_size = 8
  config.rl.steps = 50
  config.rl.learning_rate = 1e-5
  config.rl.warmup_steps = 2
  config.rl.checkpoint_every = 10
  config.rl.show_every = 10

  config.evaluate.alpha_samples = 1
  config.evaluate.batch_size = 30
  config.evaluate.transfer_max_number = 12
  config.evaluate.show_episodes = 10
  return runlocal(config) if arg.runlocal else config
