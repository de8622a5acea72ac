"""GSM8K with a cheap API core and the paper's guide, Qwen3-1.7B.

One TPU VM with 8 chips: v6e-8 or v5litepod-8, says python -m exectune_jax.fit.
A starting point: it compiles and fits, it has not been run by us.

  export GEMINI_API_KEY=...
  python -m exectune_jax.main --workdir runs/gsm8k --config.budget_usd=40 \
      --config configs/gsm8k.py:core=gemini:gemini-2.5-flash-lite

Arguments: guide (a row of models/zoo.py, downloaded from the hub unless
guide.checkpoint names a directory), core, teacher (both provider:model),
runlocal (a smoke run with the toy core and a tiny guide). GSM8K is downloaded
from upstream, or read from task.data_dir (gsm8k_train.jsonl,
gsm8k_test.jsonl).
"""

from exectune_jax.config import default_config, parse_arg, runlocal


def get_config(arg=''):
  arg = parse_arg(arg, runlocal=False, core='gemini:gemini-2.5-flash-lite',
                  teacher='gemini:gemini-2.5-pro', guide='qwen3_1p7b')
  config = default_config()
  config.stages = 'collect,sft,rl,evaluate'
  config.task.name = 'gsm8k'
  config.task.train_size = 0
  config.task.test_size = 0

  config.core.name = arg.core
  config.core.max_tokens = 1024
  config.core.concurrency = 32
  config.teacher.name = arg.teacher
  config.teacher.temperature = 1.0
  config.teacher.max_tokens = 4096

  config.guide.size = arg.guide
  config.guide.max_prompt_tokens = 384
  config.guide.max_new_tokens = 256
  config.guide.compute_dtype = 'bfloat16'
  config.guide.remat = 'full'
  config.mesh.data = 1
  config.mesh.fsdp = -1  # weights and optimizer spread over all chips

  config.collect.problems = 1000
  config.collect.max_revisions = 3
  config.sft.init = ''
  config.sft.steps = 60
  config.sft.batch_size = 8
  config.sft.row_length = 2048  # several examples a row
  config.sft.learning_rate = 1e-5
  config.rl.steps = 200
  config.rl.groups = 16
  config.rl.micro_batch = 8
  config.rl.learning_rate = 1e-6
  config.evaluate.systems = ('core_alone', 'step_by_step', 'generic', 'sft',
                             'exectune')
  return runlocal(config) if arg.runlocal else config
