"""Checkpoints of a guide in training, through Orbax.

What is trained (all weights, or adapters alone), optimizer state and plain
data (position, pending groups) are separate items, so that a stage that only
needs the weights reads only them.
"""

from __future__ import annotations

import pathlib

import jax
import orbax.checkpoint as ocp
from absl import logging

from exectune_jax import bucket
from exectune_jax.errors import UserError
from exectune_jax.learning import hosts
from exectune_jax.learning.steps import TrainState


class Checkpoints:
  """The checkpoints under `directory`, the newest kept."""

  def __init__(self, directory: pathlib.Path):
    logging.set_verbosity(logging.ERROR)  # orbax narrates every save
    self.directory = bucket.place(directory)
    self._manager = ocp.CheckpointManager(
        self.directory, options=ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False),
        item_names=('params', 'optimizer', 'extra'))

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, state: TrainState, extra: dict) -> None:
    step = int(jax.device_get(state.step))
    if self.latest() == step:
      return
    hosts.ship()  # a checkpoint never runs ahead of what it builds on
    save = ocp.args.StandardSave
    with jax.transfer_guard('allow'):  # orbax copies to the host by itself
      self._manager.save(step, args=ocp.args.Composite(
          params=save(state.params),
          optimizer=save({'opt_state': state.opt_state, 'step': state.step}),
          extra=ocp.args.JsonSave(extra)))
      self._manager.wait_until_finished()

  def restore(self, shapes: TrainState, where,
              frozen) -> tuple[TrainState, dict]:
    """Newest state and extra data.

    Args:
      shapes: abstract state. where: its shardings.
      frozen: the variables that are not trained; no checkpoint holds them.
    """
    restore = ocp.args.StandardRestore
    optimizer = {'opt_state': shapes.opt_state, 'step': shapes.step}
    placed = {'opt_state': where.opt_state, 'step': where.step}
    held = self._read(params=restore(_placed(shapes.params, where.params)),
                      optimizer=restore(_placed(optimizer, placed)),
                      extra=ocp.args.JsonRestore())
    return TrainState(held.params, frozen, held.optimizer['opt_state'],
                      held.optimizer['step']), held.extra

  def restore_params(self, shapes, where):
    """Only the weights of the newest checkpoint."""
    return self._read(params=ocp.args.StandardRestore(
        _placed(shapes, where))).params

  def _read(self, **items):
    step = self.latest()
    if step is None:
      raise UserError(f'{self.directory}: there is no checkpoint; run the '
                      'stage that trains this guide first')
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, FileNotFoundError) as e:
      raise UserError(f'{self.directory}: cannot restore step {step}: '
                      f'{str(e).splitlines()[0][:200]}; it was written by '
                      'another model or version') from e

  def close(self) -> None:
    self._manager.close()


def _placed(shapes, where):
  return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=place), shapes, where)
