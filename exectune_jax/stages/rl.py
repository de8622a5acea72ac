"""GRPO on executability rewards, from problems to updates.

The loop reads like the method: admit, sample, execute, score, compare within
the group, update. Rewards of one batch are collected while the next one is
sampled; at most `rl.max_staleness` + 1 batches are in flight, by admission,
so no finished group is ever thrown away for being late. Where `rl.replace`
says so, groups whose members all got the same reward make room for new ones.

Leaves guides/<rl.output> (checkpoint, metrics) and episodes/<rl.output>.jsonl.
A checkpoint holds the strategies that were sampled and not yet trained on,
so that a resumed run takes the very same updates.
"""

from __future__ import annotations

import collections
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from exectune_jax import interrupt, progress
from exectune_jax.cores import estimate
from exectune_jax.cores.service import CoreService
from exectune_jax.episode import LOST, MALFORMED, to_dict
from exectune_jax.errors import Stopped, UserError
from exectune_jax.learning import batches, hosts, metrics, sharding, steps
from exectune_jax.learning.advantages import group_advantages
from exectune_jax.learning.learner import Learner
from exectune_jax.rewards.collector import Collector
from exectune_jax.tasks import load_problems, make_task


def run(config, workdir):
  """Runs the stage; see the module docstring."""
  # -- set-up: problems, guide, compiled functions
  rl = config.rl
  task = make_task(config.task, config.core.shots)
  problems = load_problems(task, 'train')
  learner = Learner(config, workdir, rl)
  guide = learner.guide
  learner.check_rows(rl.micro_batch or rl.groups, 'rl.groups')
  update = learner.compile(steps.grpo_step(
      guide.model, learner.tx, clip_low=rl.clip_low, clip_high=rl.clip_high,
      tis_cap=rl.tis_cap, temperature=rl.temperature, kl=rl.kl,
      micro_batch=rl.micro_batch * (1 if rl.share_prompt else rl.group_size)))
  reference = Reference(learner, rl) if rl.kl else None

  # -- resume: weights, position, then the groups that were in flight
  state, extra, checkpoints = learner.start(rl.init, rl.output, 'rl')
  step = int(jax.device_get(state.step))
  if step >= rl.steps:
    progress.console.print(f'rl {rl.output}: done before')
    checkpoints.close()
    return
  estimate.show(config, 'rl', workdir, problems)
  next_group, replaced = extra.get('next_group', 0), []
  writer = metrics.MetricsWriter(workdir / 'guides' / rl.output, step)
  part = f'.{hosts.index()}' if hosts.index() else ''
  log = metrics.reopen(workdir / 'episodes' / f'{rl.output}{part}.jsonl', step)
  losses = collections.deque(maxlen=10)
  late = None

  def problem_of(group):
    return problems[batches.permutation(len(problems), config.seed, group,
                                        1)[0]]

  def mine(number):
    """Whether this process asks cores about a group."""
    return number % rl.groups * hosts.count() // rl.groups == hosts.index()

  def admit(numbers):
    """Samples groups; each strategy goes to the core once it is decoded."""
    chosen = [problem_of(n) for n in numbers]
    for number, problem in zip(numbers, chosen, strict=True):
      if mine(number):
        collector.open(number, problem, step)
    for s in learner.sampler.sample(
        state.variables, [guide.prompt(p) for p in chosen], numbers,
        rl.group_size, seed=config.seed, temperature=rl.temperature,
        slots=rl.groups):
      if mine(numbers[s.row]):
        collector.add(numbers[s.row], s.index,
                      guide.read(s.tokens, s.logprobs, s.complete))

  def save():
    pending, aside = (sum(hosts.gather_json(x), []) for x in (
        collector.pending(), replaced))
    checkpoints.save(state, {'next_group': next_group, 'pending': pending,
                             'replaced': aside})

  budget = hosts.budget(config, workdir, hosts.count())
  with CoreService(config, workdir, f'rl:{rl.output}', hosts.index(),
                   budget) as cores, \
      progress.track(f'rl {rl.output}: steps', rl.steps, step,
                     lambda: cores.ledger.spent_usd) as advance:
    collector, usd = Collector(cores, task, config), cores.ledger.spent_usd
    for pending in extra.get('pending', []):
      if mine(pending['number']):
        collector.restore(pending, problem_of(pending['number']))
    replaced += [e for e in extra.get('replaced', []) if mine(e['group'])]
    try:
      while step < rl.steps:
        # 1. Admit and sample, as far ahead as the staleness bound lets.
        clock = Clock()
        limit = min(step + 1 + rl.max_staleness, rl.steps) * rl.groups
        while next_group < limit:
          admit(range(next_group, next_group + rl.groups))
          next_group += rl.groups
        clock.lap('sampling')

        # 2. Execute and score: wait for the rewards of this step's groups,
        # and of those that take the place of groups without a signal.
        groups = collector.take(rl.groups // hosts.count(), step)
        clock.lap('waiting')
        while dull := replaceable(groups, rl):
          old = [g for g in groups if g[0].group in dull]
          admit([n + rl.steps * rl.groups for n in dull])
          collector.drop(old)
          replaced += [to_dict(e) for group in old for e in group]
          clock.lap('sampling')
          groups = collector.take(rl.groups // hosts.count(), step)
          clock.lap('waiting')

        # 3. Compare within groups, update.
        rows = make_batch(groups, guide, rl)
        batch = learner.put_local(rows)
        if reference:
          batch['reference_logp_BT'] = reference(batch)
        state, values = update(state, batch)
        step += 1
        core = {'seconds_core': collector.seconds(groups)}
        collector.drop(groups)

        # 4. Bookkeeping, while the update runs; metrics one step late.
        note = _report(late, writer)
        usd, before = cores.ledger.spent_usd, usd
        report = summarise(groups, rows, step, config) | hosts.mean(
            clock.report() | core | {
                'replaced': (len(replaced) * hosts.count()
                             / (rl.groups * rl.group_size)),
                'usd_step': (usd - before) * hosts.count(),
                'usd_total': usd * hosts.count()})
        late = (step, values, report)
        for row in (*replaced, *(to_dict(e) for g in groups for e in g)):
          log.write(json.dumps({'step': step, **row}) + '\n')
        log.flush()
        replaced.clear()
        if rl.show_every and (step == 1 or step % rl.show_every == 0):
          progress.show_episode(groups[0][0], f'[{rl.output} step {step}]')
        advance(1, note)
        if step % rl.checkpoint_every == 0:
          _report(late, writer)  # a checkpoint never runs ahead of its metrics
          late = None
          save()
        _check_losses(losses, report, groups, rl)
        interrupt.check(hosts.agree(interrupt.requested()))
    except (Stopped, UserError) as e:  # where state and groups agree
      # All processes are stopped together; an error is one process's own,
      # and saving takes all.
      if isinstance(e, Stopped) or hosts.count() == 1:
        save()
      raise
    else:
      save()
    finally:
      _report(late, writer)
      writer.close()
      log.close()
      checkpoints.close()


class Reference:
  """Log-probs of the guide that RL started from, for the KL term."""

  def __init__(self, learner, rl):
    # A copy: the update takes over the buffers of what training begins from.
    self.variables = jax.tree.map(jnp.copy, learner.weights(rl.init,
                                                            'rl.init'))
    self.score = jax.jit(
        steps.reference_logprobs(learner.guide.model, rl.temperature),
        out_shardings=sharding.rows(learner.mesh))

  def __call__(self, batch):
    return self.score(self.variables, batch)


class Clock:
  """Where the seconds of a step go.

  While the main thread waits for rewards, the accelerator has nothing to do:
  sampling has handed over its last token, and the update before it is done.
  """

  def __init__(self):
    self.began = self.last = time.monotonic()
    self.seconds = collections.Counter()

  def lap(self, name: str) -> None:
    now = time.monotonic()
    self.seconds[name] += now - self.last
    self.last = now

  def report(self) -> dict[str, float]:
    whole = time.monotonic() - self.began
    return {'seconds_sampling': self.seconds['sampling'],
            'seconds_waiting': self.seconds['waiting'],
            'seconds_step': whole, 'idle': self.seconds['waiting'] / whole}


def replaceable(groups, rl) -> list[int]:
  """Numbers of groups, of all processes, that fresh ones should replace:
  all rewards are the same, and that has not happened too often in a row."""
  if not rl.replace:
    return []
  found = []
  for group in groups:
    advantages, valid = _advantages(group, rl)
    replaced_before = group[0].group // (rl.steps * rl.groups)
    if (valid.any() and not advantages.any()
        and replaced_before < rl.replace):
      found.append(group[0].group)
  return sorted(sum(hosts.gather_json(found), []))


def _advantages(group, rl):
  rewards = [np.nan if e.reward is None else e.reward.total for e in group]
  return group_advantages(rewards, rl.advantage, rl.baseline,
                          group[0].base or 0.0)


def make_batch(groups, guide, rl) -> dict[str, np.ndarray]:
  """Rows for the GRPO step: a group each, or a member each.

  A lost member, or one of a group with fewer than two others left, stays in
  its row with mask 0, so that the shape hardly changes.
  """
  rows, logprobs, advantages, masks = [], [], [], []
  for group in groups:
    prompt = guide.prompt(group[0].problem)
    members = list(zip(group, *_advantages(group, rl), strict=True))
    for row in [members] if rl.share_prompt else [[m] for m in members]:
      texts = [e.strategy.tokens for e, _, _ in row]
      rows.append([batches.Block(prompt, texts)])
      logprobs.append([e.strategy.logprobs for e, _, _ in row])
      advantages.append([[a] * len(e.strategy.tokens) for e, a, _ in row])
      masks.append([[float(v)] * len(e.strategy.tokens) for e, _, v in row])
  # All processes must lay out the same shape.
  length, slots = hosts.gather(batches.shape_of(rows)).max(0).tolist()
  batch = batches.lay_out(rows, length, slots)
  return {**batch, 'mask_BT': batches.lay_slots(masks, slots),
          'sampler_logp_BT': batches.lay_slots(logprobs, slots),
          'advantage_BT': batches.lay_slots(advantages, slots)}


def summarise(groups, batch, step, config) -> dict[str, float]:
  """Reward statistics of one step, of all processes; rates are over episodes
  not lost, and left out if all are."""
  episodes = [e for group in groups for e in group]
  known = [e for e in episodes if e.status != LOST]
  n = max(1, len(known))
  bases = {e.group: e.base for e in known}
  ages = [step - 1 - group[0].version for group in groups]
  rates = {
      'reward': sum(e.reward.total for e in known) / n,
      'success': sum(e.success for e in known) / n,
      'malformed': sum(e.status == MALFORMED for e in known) / n,
      'leaks': sum(e.leaks for e in known) / n,
      'degraded': sum(e.base > e.success for e in known) / n,
      'core_alone': sum(bases.values()) / max(1, len(bases))}
  for part in config.reward:
    rates[f'part_{part}'] = sum(e.reward.parts.get(part, 0.0)
                                for e in known) / n
  return hosts.mean(rates, len(known)) | hosts.mean({
      'lost': 1 - len(known) / len(episodes),
      'no_signal': float(np.mean([
          not np.any(a) for a in np.split(batch['advantage_BT'],
                                          len(groups))])),
      'staleness': float(np.mean(ages)),
      # A histogram: which share of the groups was how many updates old.
      **{f'staleness_{age}': ages.count(age) / len(ages)
         for age in range(config.rl.max_staleness + 1)},
      'strategy_tokens': float(np.mean([len(e.strategy.tokens)
                                        for e in episodes]))})


def _report(late, writer) -> str:
  if late is None:
    return ''
  step, values, report = late
  values = jax.device_get(values)
  if 'tis_weight' in values:
    # Effective sample size of the importance weights, as a share of tokens.
    values['effective_samples'] = (values['tis_weight'] ** 2
                                   / max(values['tis_weight_sq'], 1e-9))
  writer.write(step, {**values, **report})
  if 'reward' not in report:
    return 'all episodes lost'
  return f'reward {report["reward"]:.3f}, success {report["success"]:.3f}'


def _check_losses(losses, report, groups, rl):
  """Stops a run whose core mostly fails, with the reason."""
  losses.append(report['lost'])
  if np.mean(losses) > rl.max_lost_fraction:
    reason = next((e.lost_reason for g in groups for e in g
                   if e.status == LOST), 'earlier, or in another process')
    raise UserError(
        f'rl.max_lost_fraction={rl.max_lost_fraction:g}: {np.mean(losses):.0%} '
        f'of the last {len(losses)} steps were lost ({reason}); mend the core '
        'and run the same command to go on')
