"""Group size against staleness, on the quickstart's toy core.

  python -m launch.sweep --config configs/sweep_pipeline.py \
      --workdir runs/sweep_pipeline

Nine trials of the quickstart; samples a step stay the same (128).
"""

from configs import quickstart


def get_config(arg=''):
  config = quickstart.get_config(arg)
  config.stages = 'collect,sft:base,sft,rl,evaluate'
  config.evaluate.systems = ('core_alone', 'sft', 'exectune')
  return config


def get_hyper(hyper):
  sizes = hyper.zipped(hyper.sweep('rl.group_size', (4, 8, 16)),
                       hyper.sweep('rl.groups', (32, 16, 8)))
  return hyper.product(sizes, hyper.sweep('rl.max_staleness', (0, 1, 3)))
