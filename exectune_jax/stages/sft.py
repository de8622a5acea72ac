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
from exectune_jax.learning import batches, steps
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
  prompts, targets = encode(examples(sft, workdir), learner.guide)
  step_fn = steps.compile_step(
      steps.sft_step(learner.guide.model, learner.tx,
                     learner.guide.max_new_tokens, sft.micro_batch),
      learner.mesh, learner.where)
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
        rows = batches.permutation(len(prompts), config.seed, step,
                                   sft.batch_size)
        batch = batches.pack_rows([prompts[i] for i in rows],
                                  [targets[i] for i in rows])
        state, metrics = step_fn(state, learner.put(batch))
        step += 1
        note = _report(late, writer)
        late = (step, metrics)
        advance(1, note)
        if step % sft.checkpoint_every == 0 or interrupt.requested():
          _report(late, writer)  # a checkpoint never runs ahead of its metrics
          late = None
          checkpoints.save(state, {})
        interrupt.check()
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


def encode(pairs, guide) -> tuple[list[list[int]], list[list[int]]]:
  """Token ids of prompts and targets.

  Raises:
    UserError: if no target fits guide.max_new_tokens. Single longer ones
      are left out: cut short, they would teach malformed strategies.
  """
  prompts, targets = [], []
  for question, text in pairs:
    target = guide.target(text)
    if len(target) <= guide.max_new_tokens:
      prompts.append(guide.prompt(Problem('', question, '')))
      targets.append(target)
  if not prompts:
    raise UserError(f'guide.max_new_tokens={guide.max_new_tokens}: all '
                    f'{len(pairs)} training strategies are longer')
  return prompts, targets


def _report(late, writer) -> str:
  if late is None:
    return ''
  step, metrics = late
  values = jax.device_get(metrics)
  writer.write(step, values)
  return f'loss {values["loss"]:.3f}'
