"""Training metrics: one JSON line a step, and TensorBoard."""

from __future__ import annotations

import json
import pathlib

import tensorboardX

from exectune_jax.learning import hosts


class MetricsWriter:
  """Writes under `directory`; steps are guide updates.

  Of several processes only the first one writes.
  """

  def __init__(self, directory: pathlib.Path, first_step: int = 0):
    self.silent = not hosts.first()
    if self.silent:
      return
    self._file = reopen(directory / 'metrics.jsonl', first_step)
    self._board = tensorboardX.SummaryWriter(str(directory),
                                             purge_step=first_step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    if self.silent:
      return
    row = {'step': step, **{k: float(v) for k, v in values.items()}}
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in row.items():
      if name != 'step':
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if not self.silent:
      self._file.close()
      self._board.close()


def _step(line: str) -> int:
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError):  # the line a kill cut short
    return 1 << 62


def reopen(path: pathlib.Path, last_step: int):
  """Opens a JSON lines file for appending, without rows after `last_step`.

  A killed run may have written rows after its last checkpoint; the resumed
  run writes them again.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.exists():
    kept = [line for line in path.read_text().splitlines()
            if _step(line) <= last_step]
    path.write_text(''.join(line + '\n' for line in kept))
  return path.open('a')
