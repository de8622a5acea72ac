"""What a run left behind, for notebooks: metrics, curves, episodes."""

from __future__ import annotations

import json
import pathlib

from exectune_jax.episode import Episode, from_dict

CURVES = ('loss', 'correct', 'reward', 'success', 'leaks', 'malformed')


def metrics(workdir: pathlib.Path, guide: str) -> list[dict]:
  """One row a training step, with a key for each quantity."""
  path = pathlib.Path(workdir) / 'guides' / guide / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


def episodes(workdir: pathlib.Path, guide: str) -> list[tuple[int, Episode]]:
  """(training step, episode) of everything that RL has trained on."""
  folder = pathlib.Path(workdir) / 'episodes'
  found = []
  for path in (folder / f'{guide}.jsonl',  # and those of further hosts
               *sorted(folder.glob(f'{guide}.[0-9]*.jsonl'))):
    for line in path.read_text().splitlines():
      row = json.loads(line)
      found.append((row.pop('step'), from_dict(row)))
  return sorted(found, key=lambda x: (x[0], x[1].group, x[1].index))


def curves(workdir: pathlib.Path, *guides: str):
  """A matplotlib figure: what changed from step to step, guide by guide.

  Shows those of CURVES that the guides have.
  """
  import matplotlib.pyplot as plt
  runs = {guide: metrics(workdir, guide) for guide in guides}
  names = [n for n in CURVES
           if any(n in row for run in runs.values() for row in run)]
  figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 2.6),
                              squeeze=False)
  for ax, name in zip(axes[0], names, strict=True):
    for guide, run in runs.items():
      # a step without a value had no episode that was not lost
      known = [(r['step'], r[name]) for r in run if name in r]
      if known:
        ax.plot(*zip(*known, strict=True), label=guide)
    ax.set_title(name)
    ax.set_xlabel('step')
  axes[0][0].legend()
  figure.tight_layout()
  return figure
