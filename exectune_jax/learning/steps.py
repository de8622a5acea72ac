"""The two update steps: supervised fine-tuning and GRPO.

Pure functions `step(state, batch) -> (state, metrics)`, compiled once per
batch shape with explicit shardings and a donated state. Micro-batches run in
a scan and share one denominator, so that they give the update of the whole
batch. Batches come from `batches.lay_out`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from exectune_jax.learning import losses, sharding
from exectune_jax.models.transformer import init_variables

DEVICES = 'rows'  # name of the pmap axis


@dataclasses.dataclass(frozen=True)
class TrainState:
  """What is trained, what is not, optimizer state, number of updates done.

  params, frozen: collections of the model's variables. With adapters
  {'lora': ...} is trained and {'params': ...} frozen; else all is trained.
  """
  params: Any
  frozen: Any
  opt_state: Any
  step: jax.Array

  @property
  def variables(self):
    return {**self.frozen, **self.params}


jax.tree_util.register_dataclass(TrainState)


def split(variables) -> tuple[dict, dict]:
  """(trained, frozen) collections."""
  trained = 'lora' if 'lora' in variables else 'params'
  return ({trained: variables[trained]},
          {k: v for k, v in variables.items() if k != trained})


def optimizer(section, learning_rate: float, warmup_steps: int):
  """AdamW with a linear warm-up, then constant; clipped by global norm."""
  schedule = optax.linear_schedule(0.0, learning_rate, max(1, warmup_steps))
  return optax.chain(
      optax.clip_by_global_norm(section.clip_norm),
      optax.adamw(lambda step: schedule(step + 1), section.b1, section.b2,
                  weight_decay=section.weight_decay))


def state_shardings(model, tx, mesh):
  """Abstract state and where each leaf lives."""
  def make():
    params, frozen = split(init_variables(model, jax.random.key(0)))
    return TrainState(params, frozen, tx.init(params),
                      jnp.zeros((), jnp.int32))
  shapes = jax.eval_shape(make)
  return shapes, sharding.shardings(shapes, mesh)


def new_state(variables, tx, where) -> TrainState:
  """State around given variables; the optimizer state is born sharded."""
  params, frozen = split(variables)
  opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
  step = jax.jit(lambda: jnp.zeros((), jnp.int32),
                 out_shardings=where.step)()
  return TrainState(params, frozen, opt_state, step)


def sft_step(model, tx, micro_batch: int = 0):
  """Supervised step; the loss is the mean negative log-probability of the
  completion tokens.

  micro_batch: rows at a time; 0 for the whole batch.
  """
  def loss(variables, batch):
    logp = losses.completion_logprobs(model, variables, batch)
    return -jnp.sum(logp), {
        'correct': jnp.sum(batch['mask_BT'] * (logp > -0.6931))}

  def step(state, batch, axis=None):
    return _update(state, tx, loss, batch, micro_batch, axis)

  return step


def grpo_step(model, tx, *, clip_low, clip_high, tis_cap, temperature, kl=0.0,
              micro_batch: int = 0):
  """One GRPO update (Shao et al., 2024, arXiv 2402.03300; token mean).

  Beside the fields of `batches.lay_out` the batch holds sampler_logp_BT,
  advantage_BT and, if kl > 0, reference_logp_BT; mask_BT is 0 for
  completions that take no part. There is one update per batch, so pi_old is
  the trainer's own policy now.
  """
  def loss(variables, batch):
    mask = batch['mask_BT']
    logp = losses.completion_logprobs(model, variables, batch, temperature)
    total, sums = losses.policy_loss(
        logp, jax.lax.stop_gradient(logp), batch['sampler_logp_BT'],
        batch['advantage_BT'], mask, clip_low=clip_low, clip_high=clip_high,
        tis_cap=tis_cap)
    if kl:
      weight = mask * losses.importance_weight(
          logp, batch['sampler_logp_BT'], tis_cap)
      kl_sum, k3 = losses.kl_loss(logp, batch['reference_logp_BT'], weight)
      total, sums = total + kl * kl_sum, {**sums, 'kl': k3}
    return total, sums

  def step(state, batch, axis=None):
    return _update(state, tx, loss, batch, micro_batch, axis)

  return step


def reference_logprobs(model, temperature: float):
  """Log-probs of a fixed guide on a batch, for the KL term."""
  def score(variables, batch):
    return losses.completion_logprobs(model, variables, batch, temperature)
  return score


def compile_step(step, mesh, where, mode: str = 'pjit'):
  """The step over all devices; its state is donated.

  Args:
    step: from `sft_step` or `grpo_step`.
    mesh: devices.
    where: shardings of the state.
    mode: 'pjit', any mesh (jax.jit with shardings), or 'pmap', every device
      holds the whole state and some of the rows.
  """
  rows, whole = sharding.rows(mesh), sharding.replicated(mesh)
  if mode == 'pjit':
    return jax.jit(step, in_shardings=(where, rows),
                   out_shardings=(where, whole), donate_argnums=0)
  count = sharding.row_multiple(mesh)
  mapped = jax.pmap(lambda state, batch: step(state, batch, DEVICES), DEVICES,
                    in_axes=(None, 0), out_axes=None,
                    devices=list(mesh.devices.flat))
  def run(state, batch):
    return mapped(state, jax.tree.map(
        lambda x: x.reshape(count, -1, *x.shape[1:]), batch))
  return run


def _update(state, tx, loss, batch, micro_batch, axis):
  """Gradient of loss / tokens over all micro-batches, then one update.

  axis: pmap axis over which rows are spread, or None where the compiler
    sees all of them.
  """
  rows = batch['tokens_BL'].shape[0]
  grad = jax.value_and_grad(
      lambda params, part: loss({**state.frozen, **params}, part),
      has_aux=True)
  if micro_batch and micro_batch < rows:
    # Row r goes to part r % parts: every device has rows of every part.
    parts = jax.tree.map(
        lambda x: x.reshape(micro_batch, rows // micro_batch,
                            *x.shape[1:]).swapaxes(0, 1), batch)
    def accumulate(carry, part):
      return jax.tree.map(jnp.add, carry, grad(state.params, part)), None
    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(grad, state.params, first))
    ((total, sums), grads), _ = jax.lax.scan(accumulate, zero, parts)
  else:
    (total, sums), grads = grad(state.params, batch)
  tokens = jnp.sum(batch['mask_BT'])
  if axis:
    total, sums, grads, tokens = jax.lax.psum((total, sums, grads, tokens),
                                              axis)
  tokens = jnp.maximum(tokens, 1.0)
  grads = jax.tree.map(lambda g: g / tokens, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'loss': total / tokens, 'tokens': tokens,
             'grad_norm': optax.tree.norm(grads),
             **{name: value / tokens for name, value in sums.items()}}
  return TrainState(params, state.frozen, opt_state, state.step + 1), metrics
