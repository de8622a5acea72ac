"""From episodes to the numbers of report.json."""

from __future__ import annotations

import collections
import itertools
import statistics as st
from collections.abc import Mapping, Sequence

from exectune_jax.episode import LOST, MALFORMED, Episode
from exectune_jax.report import statistics


def summarise(task: str, core: str, greedy: Mapping[str, Sequence[Episode]],
              sampled: Mapping[str, Sequence[Episode]],
              prompt_tokens: Mapping[str, Sequence[int]],
              usd_per_guide_token: float) -> dict:
  """The report of one task.

  Args:
    task, core: names.
    greedy: one episode per problem and system, in one problem order. A
      malformed strategy counts as wrong. Lost episodes leave their system's
      numbers, and both sides of a pair.
    sampled: strategies drawn at temperature 1, behind executability.
    prompt_tokens: guide prompt lengths per problem, for guided systems.
    usd_per_guide_token: for prompt and generated tokens alike.
  """
  alone = greedy['core_alone']
  systems = []
  for name, episodes in greedy.items():
    lengths = prompt_tokens.get(name) or [0] * len(episodes)
    kept = [(e, p, a) for e, p, a in zip(episodes, lengths, alone, strict=True)
            if e.status != LOST]
    systems.append({'name': name, **_system(kept, usd_per_guide_token),
                    **_alpha(sampled.get(name)),
                    'lost': len(episodes) - len(kept)})
  pairs = [_pair(a, b, greedy) for b, a in itertools.combinations(greedy, 2)]
  return {'task': task, 'core': core, 'n': len(alone), 'systems': systems,
          'paired': pairs}


def _system(kept, usd_per_guide_token) -> dict:
  n = max(1, len(kept))
  right = sum(e.success for e, _, _ in kept)
  guide = [p + len(e.strategy.tokens) if p and e.strategy else 0
           for e, p, _ in kept]
  core = [e.execution.input_tokens + e.execution.output_tokens
          if e.execution else 0 for e, _, _ in kept]
  usd = sum(e.execution.usd if e.execution else 0.0 for e, _, _ in kept)
  usd += sum(guide) * usd_per_guide_token
  known = [(e, a) for e, _, a in kept if a.status != LOST]
  degraded = sum(a.success and not e.success for e, a in known)
  return {
      'accuracy': right / n, 'ci95': list(statistics.wilson(right, len(kept))),
      'malformed_rate': sum(e.status == MALFORMED for e, _, _ in kept) / n,
      'degraded_rate': degraded / max(1, len(known)),
      'degraded_ci95': list(statistics.wilson(degraded, len(known))),
      'leak_rate': sum(e.leaks for e, _, _ in kept) / n,
      'guide_tokens': st.fmean(guide) if guide else 0.0,
      'core_tokens': st.fmean(core) if core else 0.0,
      'usd_per_1k': 1000 * usd / n,
      'usd_per_solved': usd / right if right else None}


def _alpha(episodes) -> dict:
  """Executability, and the chance that one of all draws of a problem works,
  with intervals."""
  draws = collections.defaultdict(list)
  for e in episodes or ():
    if e.status != LOST:
      draws[e.problem.id].append(e.success)
  if not draws:
    return {'executability': None, 'pass_at_k': None}
  rates = [st.fmean(d) for d in draws.values()]
  k = max(map(len, draws.values()))
  whole = [d for d in draws.values() if len(d) == k]
  passed = [statistics.pass_at_k(k, sum(d), k) for d in whole]
  count = sum(map(len, draws.values()))
  return {'executability': st.fmean(rates),
          'executability_ci95': list(statistics.clustered(rates, count)),
          'pass_at_k': {
              'k': k, 'rate': st.fmean(passed),
              'ci95': list(statistics.wilson(sum(passed), len(passed)))}}


def _pair(a: str, b: str, greedy) -> dict:
  """Accuracy of system a minus that of system b."""
  both = [(x.success, y.success)
          for x, y in zip(greedy[a], greedy[b], strict=True)
          if LOST not in (x.status, y.status)]
  left, right = [x for x, _ in both], [y for _, y in both]
  difference, interval = statistics.paired_difference(left, right)
  return {'a': a, 'b': b, 'difference': difference, 'ci95': list(interval),
          'mcnemar_p': statistics.mcnemar(left, right)}
