"""What each part of the reward is worth: all of them, then one part off.

  python -m launch.sweep --config configs/sweep_reward.py \
      --workdir runs/sweep_reward
"""

from configs import quickstart


def get_config(arg=''):
  config = quickstart.get_config(arg)
  config.stages = 'collect,sft:base,sft,rl,evaluate'
  config.evaluate.systems = ('core_alone', 'sft', 'exectune')
  return config


def get_hyper(hyper):
  parts = ('exec', 'leak', 'degrade', 'cost')
  return hyper.chain(hyper.fixed('rl.reward', 'exectune'), *[
      hyper.fixed(f'reward.{part}', 0.0) for part in parts])
