"""The two update steps: supervised fine-tuning and GRPO.

Pure functions `step(state, batch) -> (state, metrics)`, compiled once per
batch shape with explicit shardings and a donated state. Micro-batches run in
a scan and share one denominator, so that they give the update of the whole
batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from exectune_jax.learning import losses, sharding
from exectune_jax.models.transformer import init_params


@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimizer state and the number of updates done."""
  params: Any
  opt_state: Any
  step: jax.Array


jax.tree_util.register_dataclass(TrainState)


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
    params = init_params(model, jax.random.key(0))
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))
  shapes = jax.eval_shape(make)
  return shapes, sharding.shardings(shapes, mesh)


def new_state(params, tx, where) -> TrainState:
  """State around given parameters; the optimizer state is born sharded."""
  opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
  step = jax.jit(lambda: jnp.zeros((), jnp.int32),
                 out_shardings=where.step)()
  return TrainState(params, opt_state, step)


def sft_step(model, tx, slots: int, micro_batch: int = 0):
  """Supervised step on (prompt, target) rows.

  The batch holds tokens_BL, prompt_len_B and completion_len_B; the loss is
  the mean negative log-probability of the completion tokens.
  """
  def loss(params, batch):
    logp, mask = losses.completion_logprobs(model, params, batch, slots)
    return -jnp.sum(logp), {'correct': jnp.sum(mask * (logp > -0.6931))}

  def step(state, batch):
    tokens = jnp.sum(batch['completion_len_B']).astype(jnp.float32)
    return _update(state, tx, loss, batch, tokens, micro_batch)

  return step


def grpo_step(model, tx, slots: int, *, clip_low, clip_high, tis_cap,
              temperature, kl=0.0, micro_batch: int = 0):
  """One GRPO update (Shao et al., 2024, arXiv 2402.03300; token mean).

  Beside the fields of `sft_step` the batch holds sampler_logp_BT,
  advantage_B, valid_B (0 for rows that take no part) and, if kl > 0,
  reference_logp_BT. There is one update per batch, so pi_old is the
  trainer's own policy now.
  """
  def loss(params, batch):
    logp, mask = losses.completion_logprobs(model, params, batch, slots,
                                            temperature)
    mask = mask * batch['valid_B'][:, None]
    total, sums = losses.policy_loss(
        logp, jax.lax.stop_gradient(logp), batch['sampler_logp_BT'],
        batch['advantage_B'], mask, clip_low=clip_low, clip_high=clip_high,
        tis_cap=tis_cap)
    if kl:
      weight = mask * losses.importance_weight(
          logp, batch['sampler_logp_BT'], tis_cap)
      kl_sum, k3 = losses.kl_loss(logp, batch['reference_logp_BT'], weight)
      total, sums = total + kl * kl_sum, {**sums, 'kl': k3}
    return total, sums

  def step(state, batch):
    tokens = jnp.sum(batch['completion_len_B'] * batch['valid_B'])
    return _update(state, tx, loss, batch, tokens, micro_batch)

  return step


def reference_logprobs(model, slots: int, temperature: float):
  """Log-probs of a fixed guide on a batch, for the KL term."""
  def score(params, batch):
    return losses.completion_logprobs(model, params, batch, slots,
                                      temperature)[0]
  return score


def compile_step(step, mesh, where):
  """jit with the state's shardings, rows over the mesh, state donated."""
  rows, whole = sharding.rows(mesh), sharding.replicated(mesh)
  return jax.jit(step, in_shardings=(where, rows),
                 out_shardings=(where, whole), donate_argnums=0)


def _update(state, tx, loss, batch, tokens, micro_batch):
  """Gradient of loss / tokens over all micro-batches, then one update."""
  tokens = jnp.maximum(tokens, 1.0)
  rows = batch['tokens_BL'].shape[0]
  grad = jax.value_and_grad(loss, has_aux=True)
  if micro_batch and micro_batch < rows:
    parts = jax.tree.map(
        lambda x: x.reshape(rows // micro_batch, micro_batch, *x.shape[1:]),
        batch)
    def accumulate(carry, part):
      return jax.tree.map(jnp.add, carry, grad(state.params, part)), None
    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(grad, state.params, first))
    ((total, sums), grads), _ = jax.lax.scan(accumulate, zero, parts)
  else:
    (total, sums), grads = grad(state.params, batch)
  grads = jax.tree.map(lambda g: g / tokens, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'loss': total / tokens, 'tokens': tokens,
             'grad_norm': optax.tree.norm(grads),
             **{name: value / tokens for name, value in sums.items()}}
  return TrainState(params, opt_state, state.step + 1), metrics
