"""Tokens a second of a GRPO update, optimizer included.

  python -m benchmarks.grpo_step --vs torch

--groups problems with --group completions each. Ours computes a group's
prompt once (--share=0: once per completion). Peers, each at its own best
micro-batch: transformers on torch, the same loss on padded rows, logits of
completions only; google-tunix's trainer and loss (see tunix_peer.py).
tokens_per_s counts prompt and completion of every row, computed or shared,
for all.
"""

import numpy as np

from benchmarks import engine, harness, tunix_peer

OPTIONS = {'groups': 8, 'group': 8, 'prompt': 128, 'new': 64, 'share': 1,
           'micro': 1, 'torch_micro': 8, 'tunix_micro': 4}


def ours(args):
  from exectune_jax.learning import batches, steps
  prompts = engine.tokens(args.groups, args.prompt).tolist()
  texts = engine.tokens(args.groups * args.group, args.new, 1).tolist()
  groups = [batches.Block(p, texts[i * args.group:(i + 1) * args.group])
            for i, p in enumerate(prompts)]
  rows = [[g] for g in groups] if args.share else [
      [batches.Block(g.prompt, [c])] for g in groups for c in g.completions]
  batch = batches.lay_out(rows)
  shape = batch['mask_BT'].shape
  rng = np.random.default_rng(2)
  batch |= {'sampler_logp_BT': np.full(shape, -7.0, np.float32),
            'advantage_BT': rng.normal(0, 1, shape).astype(np.float32)}
  micro = args.micro * (1 if args.share else args.group)
  return engine.trainer(args, lambda model, tx: steps.grpo_step(
      model, tx, clip_low=0.2, clip_high=0.28, tis_cap=2.0, temperature=1.0,
      micro_batch=micro), batch)


def torch(args):
  import torch
  prompts = np.repeat(engine.tokens(args.groups, args.prompt), args.group, 0)
  texts = engine.tokens(args.groups * args.group, args.new, 1)
  def prepare(device):
    rows = torch.tensor(np.concatenate([prompts, texts], 1), device=device)
    advantage = torch.randn(len(rows), 1, device=device)
    def backward(model):
      for part, adv in zip(rows.split(args.torch_micro),
                           advantage.split(args.torch_micro), strict=True):
        logits = model(part, use_cache=False,
                       logits_to_keep=args.new + 1).logits[:, :-1].float()
        logp = torch.log_softmax(logits, -1).gather(
            -1, part[:, args.prompt:, None])[..., 0]
        ratio = torch.exp(logp - logp.detach())
        weight = torch.exp(logp.detach() + 7.0).clamp(max=2.0)
        gain = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)
        (-(weight * gain).sum() / (len(rows) * args.new)).backward()
    return backward
  return engine.torch_trainer(args, prepare)


def describe(args):
  texts = args.groups * args.group
  prompts = args.groups if args.share else texts
  pairs = prompts * args.prompt ** 2 / 2 + texts * args.new * (
      args.prompt + args.new / 2)
  return {'tokens': texts * (args.prompt + args.new), 'bytes': 0,
          'flops': 3 * engine.model_flops(
              args, prompts * args.prompt + texts * args.new, pairs,
              texts * args.new)}


if __name__ == '__main__':
  harness.main('grpo_step', {'ours': ours, 'torch': torch,
                             'tunix': tunix_peer.grpo}, OPTIONS, describe)
