"""The records that travel through the system, one per arrow of the picture.

  Problem -> Strategy -> Execution -> Verdict -> Reward, gathered in Episode.

All are frozen: a stage fills the next field with `dataclasses.replace`.
Everything here is plain host data (no jax), so that reward workers never
touch an accelerator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

# Whose fault was it? Decides what is learned from (see DESIGN.md).
OK = 'ok'  # the core answered: right, wrong, truncated or refused
MALFORMED = 'malformed'  # no usable strategy: reward 0, core not called
LOST = 'lost'  # nobody can know: leaves the statistics and the loss


@dataclasses.dataclass(frozen=True)
class PlanStep:
  """One arithmetic step of a reference plan.

  Operands are numerals from the question, '#k' for the result of step k
  (from 1), or a conversion factor. `words` says the same without numbers.
  """
  left: str
  op: str
  right: str
  words: str


@dataclasses.dataclass(frozen=True)
class Tests:
  """What a program is judged by.

  source: Python that raises unless the program is right.
  entry_point: what the program must define ('': no single name).
  setup: what the program and its tests both begin with.
  """
  source: str
  entry_point: str = ''
  setup: str = ''


@dataclasses.dataclass(frozen=True)
class Problem:
  """One task instance.

  answer: the reference, a value or a program; it stays on our side, as do
    plan and tests.
  plan: how a reference solution goes, where a task knows.
  tests: of tasks whose answers are programs.
  """
  id: str
  question: str
  answer: str
  plan: tuple[PlanStep, ...] = ()
  tags: tuple[str, ...] = ()
  tests: Tests | None = None


@dataclasses.dataclass(frozen=True)
class Strategy:
  """What the guide wrote.

  text: the decoded completion, as sampled.
  body: what stands between the strategy tags, or None when malformed.
  fault: why it is malformed ('' when it is not).
  tokens: sampled token ids, with the end token where one was sampled.
  logprobs: log-probability of each token under the sampling distribution.
  """
  text: str
  body: str | None
  fault: str = ''
  tokens: tuple[int, ...] = ()
  logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Execution:
  """The core's reply. finish: 'stop', 'length' or 'refused'.

  cached_tokens: of the input, read from the provider's cache.
  thinking_tokens: of the output, not shown.
  estimated: the server did not say how many tokens; ours is a guess.
  """
  text: str
  finish: str
  input_tokens: int
  output_tokens: int
  usd: float
  latency_s: float
  cached_tokens: int = 0
  thinking_tokens: int = 0
  estimated: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether the reply is right.

  extracted: the final answer that was read in it, or what became of its
    program ('passed', 'failed: ...', 'timeout').
  """
  correct: bool
  extracted: str | None = None


@dataclasses.dataclass(frozen=True)
class Reward:
  """Total and its named parts (already weighted; they sum to the total)."""
  total: float
  parts: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Episode:
  """One strategy from proposal to reward.

  group, index: which group this is in and its place there; members are
    always found by these two, never by arrival order.
  version: training step of the policy that sampled the strategy.
  base: mean success of the core alone on this problem, in [0, 1].
  base_usd: mean dollars of one core-alone call on this problem.
  judge: quality in [0, 1] from an LLM judge, None where there is none.
  """
  problem: Problem
  group: int = 0
  index: int = 0
  version: int = 0
  strategy: Strategy | None = None
  execution: Execution | None = None
  verdict: Verdict | None = None
  status: str = OK
  lost_reason: str = ''
  leaks: bool = False
  base: float | None = None
  base_usd: float | None = None
  judge: float | None = None
  reward: Reward | None = None

  @property
  def success(self) -> bool:
    return (self.status == OK and self.verdict is not None
            and self.verdict.correct)


def to_dict(record) -> dict:
  """Plain JSON-ready view of a record, for logs, checkpoints, graders."""
  return dataclasses.asdict(record)


def problem_from(data: Mapping) -> Problem:
  """Inverse of `to_dict` (also after a trip through JSON)."""
  tests = data.get('tests')  # records of before there were any lack it
  return Problem(**{
      **data, 'plan': tuple(PlanStep(**s) for s in data['plan']),
      'tags': tuple(data['tags']), 'tests': tests and Tests(**tests)})


def from_dict(data: Mapping) -> Episode:
  """Inverse of `to_dict`, for episodes."""
  def build(cls, value, **fields):
    return None if value is None else cls(**{**value, **fields})

  strategy = data['strategy']
  if strategy is not None:
    strategy = build(Strategy, strategy, tokens=tuple(strategy['tokens']),
                     logprobs=tuple(strategy['logprobs']))
  return Episode(**{
      **data, 'problem': problem_from(data['problem']), 'strategy': strategy,
      'execution': build(Execution, data['execution']),
      'verdict': build(Verdict, data['verdict']),
      'reward': build(Reward, data['reward'])})
