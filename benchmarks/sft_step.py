"""Tokens a second of a supervised update, optimizer included.

  python -m benchmarks.sft_step --vs torch

Every token of every row is predicted. Peers, on the same weights and rows,
each at its own best micro-batch: transformers on torch with AdamW,
google-tunix's trainer (see tunix_peer.py).
"""

from benchmarks import engine, harness, tunix_peer

OPTIONS = {'rows': 16, 'length': 256, 'micro': 4, 'torch_micro': 4,
           'tunix_micro': 4}


def ours(args):
  from exectune_jax.learning import batches, steps
  rows = engine.tokens(args.rows, args.length + 1).tolist()
  batch = batches.lay_out([[batches.Block(row[:1], [row[1:]])]
                           for row in rows])
  assert batch['mask_BT'].sum() == args.rows * args.length
  return engine.trainer(args, lambda model, tx: steps.sft_step(
      model, tx, args.micro), batch)


def torch(args):
  import torch
  def prepare(device):
    rows = torch.tensor(engine.tokens(args.rows, args.length + 1),
                        device=device)
    def backward(model):
      for part in rows.split(args.torch_micro):
        logits = model(part[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), part[:, 1:].flatten(),
            reduction='sum')
        (loss / (args.rows * args.length)).backward()
    return backward
  return engine.torch_trainer(args, prepare)


def describe(args):
  tokens = args.rows * args.length
  return {'tokens': tokens, 'bytes': 0, 'flops': 3 * engine.model_flops(
      args, tokens, tokens * args.length / 2, tokens)}


if __name__ == '__main__':
  harness.main('sft_step', {'ours': ours, 'torch': torch,
                            'tunix': tunix_peer.sft}, OPTIONS, describe)
