"""google-tunix as a peer, in an environment of its own:

  python -m venv TUNIX && TUNIX/bin/pip install google-tunix
  python -m benchmarks.sampler --vs tunix --tunix_python=TUNIX/bin/python

It pins packages that ours need newer, so it cannot live beside them. Llama
shapes only (SmolLM2's): each of tunix's decoders is a class of its own.
"""

from __future__ import annotations

import functools

from benchmarks import engine

# Ids of tokens as text: the sampler accepts text only. No token begins a
# prompt and none ends a completion, so that every sample is of full length.
_NEVER = 1 << 30


class _Ids:
  def encode(self, text):
    return [int(i) for i in text.split()]

  def decode(self, ids):
    return ' '.join(map(str, ids))

  def bos_id(self):
    return 0

  def eos_id(self):
    return _NEVER

  def pad_id(self):
    return 0


def _model(args, remat='NONE'):
  from tunix.models.llama3 import model as llama
  from tunix.models.llama3 import params

  import jax
  from exectune_jax.models import hf
  c = hf.read_config(args.checkpoint)
  # Version 0.1.7 drops the config's rope_theta on its way to this function.
  llama.apply_rope = functools.partial(llama.apply_rope,
                                       rope_theta=c.rope_theta)
  config = llama.ModelConfig(
      num_layers=c.layers, vocab_size=c.vocab, embed_dim=c.dim,
      hidden_dim=c.mlp_dim, num_heads=c.heads, head_dim=c.head_dim,
      num_kv_heads=c.kv_heads, rope_theta=c.rope_theta, norm_eps=c.norm_eps,
      weight_tying=c.tied, remat_config=llama.RematConfig[remat])
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  return params.create_model_from_safe_tensors(
      args.checkpoint, config, mesh, getattr(jax.numpy, args.dtype)), config


def sampler(args):
  from tunix.generate import sampler as lib
  model, c = _model(args)
  cache = lib.CacheConfig(
      cache_size=args.prompt + args.new, num_layers=c.num_layers,
      num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
  sample = lib.Sampler(model, _Ids(), cache)
  prompts = [_Ids().decode(row)
             for row in engine.tokens(args.prompts, args.prompt)
             for _ in range(args.group)]
  seeds = iter(range(1, 1_000_000))
  def run():
    # Without top_p it takes the likeliest token.
    found = sample(prompts, args.new, max_prompt_length=args.prompt,
                   temperature=1.0, top_p=1.0, seed=next(seeds))
    assert all(len(tokens) == args.new for tokens in found.tokens)
  return run


def sft(args):
  from tunix.sft import peft_trainer, utils

  import jax.numpy as jnp
  rows = jnp.asarray(engine.tokens(args.rows, args.length + 1), jnp.int32)
  parts = [peft_trainer.TrainingInput(input_tokens=part,
                                      input_mask=jnp.ones_like(part))
           for part in jnp.split(rows, args.rows // args.tunix_micro)]
  trainer = _trainer(args, peft_trainer.PeftTrainer, len(parts))
  def model_input(x):
    seen = x.input_mask.astype(bool)
    return {'input_tokens': x.input_tokens, 'input_mask': x.input_mask,
            'positions': utils.build_positions_from_mask(seen),
            'attention_mask': utils.make_causal_attn_mask(seen)}
  return _updates(trainer.with_gen_model_input_fn(model_input), parts)


def grpo(args):
  from tunix.rl import algo_core, common, trainer
  from tunix.rl.grpo import grpo_learner

  import jax.numpy as jnp
  import numpy as np
  prompts = np.repeat(engine.tokens(args.groups, args.prompt), args.group, 0)
  texts = engine.tokens(args.groups * args.group, args.new, 1)
  advantage = np.random.default_rng(2).normal(0, 1, len(texts))
  def part(chosen):
    new = jnp.asarray(texts[chosen], jnp.int32)
    old = jnp.asarray(prompts[chosen], jnp.int32)
    return common.TrainExample(
        prompt_ids=old, prompt_mask=jnp.ones_like(old), completion_ids=new,
        completion_mask=jnp.ones_like(new),
        advantages=jnp.asarray(advantage[chosen], jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.full(new.shape, -7.0))
  parts = [part(chosen) for chosen in np.split(
      np.arange(len(texts)), len(texts) // args.tunix_micro)]
  settings = grpo_learner.GRPOConfig(num_generations=args.group, beta=0.0,
                                     loss_agg_mode='token-mean')
  settings.temperature = 1.0
  updates = _trainer(args, functools.partial(
      trainer.Trainer, custom_checkpoint_metadata_fn=dict), len(parts))
  def loss(model, example):
    return algo_core.grpo_loss_fn(model, example, settings, 0, _NEVER)
  updates.with_loss_fn(loss, has_aux=True)
  return _updates(updates.with_gen_model_input_fn(
      lambda x: {'example': x}), parts)


def _trainer(args, make, parts: int):
  from tunix.sft import peft_trainer

  import optax
  model, _ = _model(args, 'DECODER')
  adam = optax.chain(optax.clip_by_global_norm(1.0),
                     optax.adamw(1e-6, weight_decay=0.0))
  trainer = make(model=model, optimizer=adam,
                 training_config=peft_trainer.TrainingConfig(
                     eval_every_n_steps=1 << 30,
                     gradient_accumulation_steps=parts))
  trainer.is_managed_externally = True  # stays open between updates
  return trainer


def _updates(trainer, parts):
  import jax
  from flax import nnx
  def run():
    trainer.train(parts)
    jax.block_until_ready(nnx.state(trainer.model))
  return run
