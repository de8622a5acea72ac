"""Who proposes strategies during collection: a script, or any core.

A teacher is `async propose(problem, history, rng) -> (text, style)`, where
history holds (text, feedback) of the rejected tries on this problem; style
is a label for the statistics. The scripted
teacher writes word-problem strategies in several styles, some of which no
core can use: which style survives is decided by the core, not by us. 'loose'
is the expression as people write it, operands in either order, with or
without a full stop: no teacher knows which of them a given core obeys best.
"""

from __future__ import annotations

import dataclasses
import random

from exectune_jax import prompts, strategy
from exectune_jax.cores.base import CoreRequest
from exectune_jax.episode import Problem
from exectune_jax.errors import UserError
from exectune_jax.tasks import word_problems

STYLES = ('steps', 'expression', 'named', 'verbal', 'wrong', 'reveals',
          'loose')
_VERBS = {'+': 'add {1} to {0}', '-': 'subtract {1} from {0}',
          '*': 'multiply {0} by {1}', '/': 'divide {0} by {1}'}


class ScriptedTeacher:
  """Samples a style, never the same style twice in a row on one problem.

  Args:
    weights: relative frequency of each of STYLES.
  """

  def __init__(self, weights):
    unknown = set(weights) - set(STYLES)
    if unknown:
      raise UserError(f'collect.styles has {sorted(unknown)}: choose from '
                      f'{", ".join(STYLES)}')
    self.weights = {s: float(w) for s, w in weights.items() if w > 0}

  async def propose(self, problem: Problem, history, rng: random.Random):
    if not problem.plan:
      raise UserError("teacher.name='scripted' needs problems with a plan "
                      "(task.name='word_problems'); name a core as teacher, "
                      "such as 'gemini:gemini-2.5-pro'")
    styles = dict(self.weights)
    if history and len(styles) > 1:
      last = history[-1][0]
      styles = {s: w for s, w in styles.items()
                if write(problem, s, random.Random(0)) != last} or styles
    style = rng.choices(tuple(styles), tuple(styles.values()))[0]
    return write(problem, style, rng), style


def write(problem: Problem, style: str, rng: random.Random) -> str:
  """The reference plan of `problem` in one of STYLES, tagged."""
  plan = problem.plan
  if style == 'wrong':
    plan = _spoil(plan, rng)
  if style == 'expression':
    body = _nested(plan)
  elif style == 'verbal':
    body = _sentence([step.words for step in plan])
  elif style == 'named':
    body = _sentence([_VERBS[s.op].format(
        _operand(s.left, 'the result'), s.right) for s in plan])
  elif style == 'loose':
    body = _nested((_commute(plan[0], rng), *plan[1:])) + rng.choice(('', '.'))
  elif style == 'reveals':
    results = word_problems.evaluate_plan(plan)
    shown = [word_problems.format_number(r) for r in results]
    body = ', then '.join(
        f'{_operand(s.left, shown[i - 1])} {s.op} {s.right} = {shown[i]}'
        for i, s in enumerate(plan))
  else:  # steps, wrong
    lines = [f'{_operand(s.left, "?")} {s.op} {s.right}' for s in plan]
    body = ' = ?, then '.join(lines)
  return strategy.wrap(body)


def _operand(token: str, reference: str) -> str:
  return reference if token.startswith('#') else token


def _sentence(clauses: list[str]) -> str:
  text = ', then '.join(clauses)
  return text[0].upper() + text[1:] + '.'


def _nested(plan) -> str:
  """One expression: '(6 * 3 + 4) / 2', with the brackets that it needs."""
  text = plan[0].left
  for i, step in enumerate(plan):
    loose = i > 0 and plan[i - 1].op in '+-' and step.op in '*/'
    text = f'({text}) {step.op} {step.right}' if loose else (
        f'{text} {step.op} {step.right}')
  return text


def _commute(step, rng):
  """The step, or the same with its operands exchanged, at even odds."""
  if step.op in '+*' and rng.random() < 0.5:
    return dataclasses.replace(step, left=step.right, right=step.left)
  return step


def _spoil(plan, rng):
  """The plan with one operator replaced by another."""
  i = rng.randrange(len(plan))
  op = rng.choice([o for o in '+-*/' if o != plan[i].op])
  step = word_problems.PlanStep(plan[i].left, op, plan[i].right, '')
  return (*plan[:i], step, *plan[i + 1:])


class LLMTeacher:
  """Any core as teacher; it sees what the target core did with its tries."""

  def __init__(self, client, settings):
    self.client, self.settings = client, settings

  async def propose(self, problem: Problem, history, rng: random.Random):
    del rng  # the core's own sampling decides
    request = CoreRequest.build(
        self.settings, prompts.teacher_messages(problem.question, history),
        sample=len(history))
    return (await self.client.call(request)).text, ''
