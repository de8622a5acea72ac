"""What each part of the reward is worth: all of them, then one part off.

  python -m launch.sweep --config configs/sweep_reward.py \
      --workdir runs/sweep_reward
"""

from configs.sweep_pipeline import get_config as get_config


def get_hyper(hyper):
  parts = ('exec', 'leak', 'degrade', 'cost')
  return hyper.chain(hyper.fixed('rl.reward', 'exectune'), *[
      hyper.fixed(f'reward.{part}', 0.0) for part in parts])
