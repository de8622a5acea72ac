"""Tokens a second of the sampler.

  python -m benchmarks.sampler --vs hf
  python -m benchmarks.sampler --vs hf --prompts=64 --group=1

Peers, on the same weights, prompts and numbers of tokens: transformers'
generate on torch, google-tunix's sampler (see tunix_peer.py). Every sample
runs to --new tokens: no token ends it.
"""

from benchmarks import engine, harness, tunix_peer

OPTIONS = {'prompts': 8, 'group': 8, 'prompt': 128, 'new': 64}


def ours(args):
  from exectune_jax.sampling.sampler import Sampler
  model, variables, mesh = engine.ours(args, remat='none')
  sampler = Sampler(model, -1, args.new, mesh)
  prompts = engine.tokens(args.prompts, args.prompt).tolist()
  seeds = iter(range(1_000_000))
  def run():
    found = list(sampler.sample(variables, prompts, range(args.prompts),
                                args.group, seed=next(seeds),
                                temperature=1.0))
    assert len(found) == args.prompts * args.group
    assert all(len(s.tokens) == args.new for s in found)
  return run


def hf(args):
  import torch
  model, device = engine.torch_model(args)
  prompts = torch.tensor(engine.tokens(args.prompts, args.prompt),
                         device=device)
  def run():
    with torch.no_grad():
      found = model.generate(
          prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
          temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
          pad_token_id=0, num_return_sequences=args.group,
          max_new_tokens=args.new, min_new_tokens=args.new)
    assert found.shape == (args.prompts * args.group, args.prompt + args.new)
    if device == 'cuda':
      torch.cuda.synchronize()
  return run


def describe(args):
  from exectune_jax import roofline
  from exectune_jax.models import hf as files
  c = files.read_config(args.checkpoint, dtype=args.dtype)
  step = roofline.decode_token(c, args.prompts, args.group, args.prompt,
                               args.new // 2, False, chips=1, fsdp=1, tensor=1)
  samples = args.prompts * args.group
  return {'tokens': samples * args.new, 'bytes': args.new * step.bytes,
          'flops': args.new * step.flops + engine.model_flops(
              args, args.prompts * args.prompt,
              args.prompts * args.prompt ** 2 / 2, args.prompts)}


if __name__ == '__main__':
  harness.main('sampler', {'ours': ours, 'hf': hf,
                           'tunix': tunix_peer.sampler}, OPTIONS, describe)
