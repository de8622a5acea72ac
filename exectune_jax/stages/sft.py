"""Supervised fine-tuning of a guide on the teacher's strategies.

`sft.data='accepted'` trains on what the target core succeeded with;
'proposed' on the teacher's first proposals as they came, which gives the
base guide that everything else is compared with.

Leaves guides/<sft.output>: checkpoint, metrics.jsonl and TensorBoard files.
"""

from __future__ import annotations

import jax

from exectune_jax import interrupt, progress, strategy
from exectune_jax.errors import UserError
from exectune_jax.learning import batches, hosts, steps
from exectune_jax.learning.learner import Learner
from exectune_jax.learning.metrics import MetricsWriter
from exectune_jax.episode import Problem
from exectune_jax.stages import collect


def run(config, workdir):
  """Runs the stage; see the module docstring."""
  # -- set-up
  sft = config.sft
  learner = Learner(config, workdir, sft)
  learner.check_rows(sft.micro_batch or sft.batch_size, 'sft.batch_size')
  data = Rows(encode(examples(sft, workdir), learner.guide), sft, config.seed)
  step_fn = learner.compile(steps.sft_step(learner.guide.model, learner.tx,
                                           sft.micro_batch))
  state, _, checkpoints = learner.start(sft.init, sft.output, 'sft')
  step = int(jax.device_get(state.step))
  folder = workdir / 'guides' / sft.output
  if step >= sft.steps:
    progress.console.print(f'sft {sft.output}: done before')
    checkpoints.close()
    return
  writer = MetricsWriter(folder, step)

  # -- loop; metrics are read one step late, while the next step runs
  late = None
  try:
    with progress.track(f'sft {sft.output}: steps', sft.steps, step) as advance:
      while step < sft.steps:
        state, metrics = step_fn(state, learner.put(data.batch(step)))
        step += 1
        note = _report(late, writer)
        late = (step, metrics)
        advance(1, note)
        stop = hosts.agree(interrupt.requested())
        if step % sft.checkpoint_every == 0 or stop:
          _report(late, writer)  # a checkpoint never runs ahead of its metrics
          late = None
          checkpoints.save(state, {})
        interrupt.check(stop)
  finally:
    _report(late, writer)
    writer.close()
  checkpoints.save(state, {})
  checkpoints.close()


def examples(sft, workdir) -> list[tuple[str, str]]:
  """(question, strategy text) pairs, best known first come."""
  rows = collect.read(workdir)
  if sft.data == 'accepted':
    rows = [r for r in rows if r['accepted']]
  else:
    rows = [r for r in rows
            if r['round'] == 0 and strategy.parse(r['text']).body]
  rows = rows[:sft.examples or None]
  if not rows:
    raise UserError(f"sft.data='{sft.data}': the collect stage left no such "
                    'strategy; raise collect.problems or use a better teacher')
  return [(r['question'], r['text'].strip()) for r in rows]


def encode(pairs, guide) -> list[batches.Block]:
  """Prompts and targets as token ids.

  Raises:
    UserError: if no target fits guide.max_new_tokens. Single longer ones
      are left out: cut short, they would teach malformed strategies.
  """
  blocks = []
  for question, text in pairs:
    target = guide.target(text)
    if len(target) <= guide.max_new_tokens:
      blocks.append(batches.Block(guide.prompt(Problem('', question, '')),
                                  [target]))
  if not blocks:
    raise UserError(f'guide.max_new_tokens={guide.max_new_tokens}: all '
                    f'{len(pairs)} training strategies are longer')
  return blocks


class Rows:
  """Batch number n of the shuffled examples, one or many examples a row."""

  def __init__(self, blocks, sft, seed):
    self.blocks, self.sft, self.seed = blocks, sft, seed
    longest = max(b.length for b in blocks)
    if sft.row_length and longest > sft.row_length:
      raise UserError(f'sft.row_length={sft.row_length}: the longest example '
                      f'has {longest} tokens; raise it, or 0 for one a row')
    self.packed = batches.PackedStream([b.length for b in blocks],
                                       sft.row_length, seed)

  def batch(self, number: int) -> dict:
    size = self.sft.batch_size
    if self.sft.row_length:
      rows = self.packed.rows(number, size)
    else:
      rows = [[i] for i in batches.permutation(len(self.blocks), self.seed,
                                               number, size)]
    return batches.lay_out([[self.blocks[i] for i in row] for row in rows],
                           self.sft.row_length)


def _report(late, writer) -> str:
  if late is None:
    return ''
  step, metrics = late
  values = jax.device_get(metrics)
  writer.write(step, values)
  return f'loss {values["loss"]:.3f}'
