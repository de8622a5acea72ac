"""What both training stages and evaluation set up before they start."""

from __future__ import annotations

import functools
import pathlib

import jax
import numpy as np

from exectune_jax.errors import UserError
from exectune_jax.learning import sharding, steps
from exectune_jax.learning.checkpoint import Checkpoints
from exectune_jax.models import guide as guides
from exectune_jax.sampling.sampler import Sampler


class Learner:
  """Guide, mesh, optimizer and the places of every array.

  Args:
    config: the whole config.
    workdir: its guides/ folder holds one checkpoint folder a guide.
    section: config.sft or config.rl (learning rate and warm-up).
  """

  def __init__(self, config, workdir: pathlib.Path, section):
    self.config, self.workdir = config, workdir
    self.mesh = sharding.make_mesh(config.mesh)
    # Under pmap every device works alone and sees no mesh.
    self.guide = guides.load(config, workdir, self.mesh if
                             config.mesh.mode == 'pjit' else None)
    self.tx = steps.optimizer(config.optim, section.learning_rate,
                              section.warmup_steps)
    self.shapes, self.where = steps.state_shardings(
        self.guide.model, self.tx, self.mesh)

  @functools.cached_property
  def sampler(self) -> Sampler:
    """One sampler, so that each of its programs is compiled once."""
    guide = self.guide
    return Sampler(guide.model, guide.end, guide.max_new_tokens, self.mesh,
                   guide.stop_at, self.config.guide.int8_cache,
                   self.config.mesh.gather_to_sample)

  @functools.cached_property
  def first(self):
    """Variables before any training."""
    whole = sharding.replicated(self.mesh)
    key = jax.jit(jax.random.key, out_shardings=whole)(
        sharding.put(np.uint32(self.config.seed), whole))
    return guides.first_variables(
        self.config, self.guide, key, self.variables,
        {**self.where.frozen, **self.where.params})

  @property
  def variables(self):
    """Abstract variables of the guide."""
    return self.shapes.variables

  def compile(self, step):
    return steps.compile_step(step, self.mesh, self.where,
                              self.config.mesh.mode)

  def start(self, init: str, output: str, section_name: str):
    """Resumes guide `output`, or begins it from guide `init`.

    Returns:
      state, the extra data of its checkpoint ({} at the beginning), and its
      Checkpoints.
    """
    folder = self.workdir / 'guides' / output
    guides.claim(self.guide, folder)
    checkpoints = Checkpoints(folder)
    if checkpoints.latest() is not None:
      return (*checkpoints.restore(self.shapes, self.where, self._frozen()),
              checkpoints)
    variables = self.weights(init, f'{section_name}.init')
    return steps.new_state(variables, self.tx, self.where), {}, checkpoints

  def weights(self, name: str, field: str):
    """Variables of a trained guide; '' is the guide before any training."""
    if not name:
      return self.first
    folder = self.workdir / 'guides' / name
    if not (folder / 'guide.json').exists():
      raise UserError(f"{field}='{name}': there is no {folder}; run the stage "
                      'that trains this guide first')
    guides.claim(self.guide, folder)
    checkpoints = Checkpoints(folder)
    params = checkpoints.restore_params(self.shapes.params, self.where.params)
    checkpoints.close()
    return {**self._frozen(), **params}

  def _frozen(self):
    """The collections that no checkpoint of ours holds."""
    return {k: self.first[k] for k in self.shapes.frozen}

  def put(self, batch):
    """A batch that every process holds, on the devices, rows over the mesh."""
    return sharding.put(batch, sharding.rows(self.mesh))

  def put_local(self, batch):
    """A batch of which each process holds its own rows."""
    return sharding.put_local(batch, sharding.rows(self.mesh))

  def check_rows(self, count: int, field: str) -> None:
    multiple = sharding.row_multiple(self.mesh)
    if count % multiple:
      raise UserError(f'{field}={count}: must be a multiple of {multiple}, '
                      'the devices that share the rows')
