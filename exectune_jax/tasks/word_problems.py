"""Arithmetic word problems from seeded templates: unlimited and offline.

A problem is a chain: a start (a count, or containers with items in each),
events that add or take away, and an end (a price or fair shares). Families
say how many steps the chain has; `one_step` always carries an irrelevant
number, `units` needs a conversion factor that the text does not state. Each
problem carries its reference plan. Which split a problem belongs to is
decided by a hash of its text, so splits cannot overlap.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from fractions import Fraction

from exectune_jax.episode import PlanStep, Problem
from exectune_jax.errors import UserError
from exectune_jax.tasks.base import MathTask

NAMES = ('Ada Ben Carla Diego Emma Farid Grace Hiro Ines Jonas Kira Liam Mona '
         'Nico Olga Priya Quinn Ravi Sara Tom').split()
DOMAINS = {  # (container, item)
    'school': (('box', 'pencil'), ('pack', 'notebook'), ('folder', 'sticker')),
    'kitchen': (('tray', 'muffin'), ('jar', 'cookie'), ('bag', 'apple')),
    'garden': (('row', 'tulip'), ('pot', 'seed'), ('bed', 'carrot')),
    'workshop': (('crate', 'bolt'), ('drawer', 'screw'), ('rack', 'brush')),
    'library': (('shelf', 'book'), ('case', 'map'), ('album', 'photo')),
}
UNITS = (  # whole, part, factor
    ('hour', 'minute', 60), ('minute', 'second', 60), ('week', 'day', 7),
    ('day', 'hour', 24), ('year', 'month', 12), ('foot', 'inch', 12),
    ('yard', 'foot', 3), ('meter', 'centimeter', 100), ('dozen', 'egg', 12))
PLURALS = {'box': 'boxes', 'shelf': 'shelves', 'foot': 'feet',
           'inch': 'inches', 'dozen': 'dozen', 'brush': 'brushes'}

PRODUCT = (
    '{name} has {a} {cs} with {b} {xs} in each.',
    'There are {a} {cs} and each one holds {b} {xs}.',
    '{name} fills {a} {cs} and puts {b} {xs} into every one.')
COUNT = ('{name} has {a} {xs}.', '{name} starts with {a} {xs}.',
         'There are {a} {xs} on the table.')
ADD = ('{name} buys {c} more {xs}.', 'Then {name} finds {c} {xs}.',
       'A neighbor brings {c} {xs}.')
TAKE = ('{name} gives away {c} {xs}.', 'Then {c} {xs} are lost.',
        '{name} uses {c} of the {xs}.')
PRICE = ('Each {x} sells for {k} dollars. How many dollars do they bring?',
         'One {x} costs {k} dollars. How many dollars are they all worth?',
         'The price of every {x} is {k} dollars. '
         'How many dollars is that in total?')
SHARE = ('They are shared equally among {k} friends. '
         'How many {xs} does each friend get?',
         '{k} children split them equally. How many {xs} does each child get?',
         'All are divided equally over {k} tables. '
         'How many {xs} are on each table?')
ASK = ('How many {xs} are there now?', 'How many {xs} is that in all?',
       'What is the number of {xs} at the end?')
IRRELEVANT = ('{name} is {d} years old.', 'The room has {d} windows.',
              'It rained for {d} days.')
CONVERT = ('A trip takes {a} {ws}. How many {ps} is that?',
           '{name} counts {a} {ws}. How many {ps} does that make?',
           'How many {ps} are there in {a} {ws}?')

STEPS = {'one_step': 1, 'two_step': 2, 'three_step': 3, 'four_step': 4}
FAMILIES = (*STEPS, 'units')
PATIENCE = 5000  # draws without a new problem after which there are no more
_SHARES = {'train': range(30, 100), 'validation': range(0, 10),
           'test': range(10, 30)}  # percent of the hash space


class WordProblems(MathTask):
  """Reads config.task: families, operations, max_number, wordings, *_size.

  families: which of FAMILIES, drawn uniformly.
  operations: the allowed operators, a subset of '+-*/'.
  max_number: largest operand in the text (operands start at 2).
  wordings: how many paraphrases of each sentence are in use, 1 to 3.
  """

  def __init__(self, options, shots=0):
    super().__init__(options, shots)
    unknown = set(options.families) - set(FAMILIES)
    if unknown or not options.families:
      raise UserError(f'task.families={tuple(options.families)}: choose from '
                      f'{", ".join(FAMILIES)}')
    if not set(options.operations) <= set('+-*/') or not options.operations:
      raise UserError(f"task.operations='{options.operations}': use a "
                      "non-empty subset of '+-*/'")
    if options.max_number < 4:
      raise UserError(f'task.max_number={options.max_number}: at least 4')
    if not 1 <= options.wordings <= 3:
      raise UserError(f'task.wordings={options.wordings}: 1, 2 or 3')

  def problems(self, split: str) -> Sequence[Problem]:
    size = self.options[f'{split}_size']
    found, texts, last = [], set(), 0
    for index in itertools.count():
      if len(found) == size:
        return found
      if index - last > PATIENCE:
        break
      problem = self.generate(split, index)
      if problem and problem.question not in texts:
        texts.add(problem.question)
        found.append(problem)
        last = index
    raise UserError(
        f'task.{split}_size={size}: only {len(found)} different problems '
        'exist with these settings; raise task.max_number or task.wordings')

  def generate(self, split: str, index: int) -> Problem | None:
    """Draw `index` of a split; None if it belongs to another split."""
    rng = random.Random(f'{self.options.seed}/{split}/{index}')
    family = rng.choice(tuple(self.options.families))
    draw = _units if family == 'units' else _chain
    drawn = draw(rng, self.options, STEPS.get(family))
    if drawn is None:
      return None
    question, plan = drawn
    bucket = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 100
    if bucket not in _SHARES[split]:
      return None
    answer = evaluate_plan(plan)[-1]
    return Problem(f'{split}-{index}', question, format_number(answer), plan,
                   (family,))


def evaluate_plan(plan: Sequence[PlanStep]) -> list[Fraction]:
  """Result of every step, exactly."""
  results = []
  for step in plan:
    left, right = (results[int(t[1:]) - 1] if t.startswith('#')
                   else Fraction(t) for t in (step.left, step.right))
    results.append({'+': left + right, '-': left - right, '*': left * right,
                    '/': left / right if right else None}[step.op])
  return results


def format_number(value: Fraction) -> str:
  return (str(value.numerator) if value.denominator == 1
          else f'{value.numerator}/{value.denominator}')


def plural(noun: str) -> str:
  return PLURALS.get(noun, noun + 's')


def _pick(rng, options, wordings, **fields):
  return rng.choice(wordings[:options.wordings]).format(**fields)


def _units(rng, options, _):
  """A conversion whose factor is general knowledge."""
  whole, part, factor = rng.choice(UNITS)
  down = '*' in options.operations
  up = '/' in options.operations and (not down or rng.random() < 0.3)
  if not (down or up):
    return None
  a = rng.randint(2, options.max_number)
  name = rng.choice(NAMES)
  op, number, ws, ps = '*', a, plural(whole), plural(part)
  words = f'multiply the {ws} by the {ps} in one {whole}'
  if up:
    op, number, ws, ps = '/', a * factor, ps, ws
    words = f'divide the {ws} by the {ws} in one {whole}'
  text = _pick(rng, options, CONVERT, a=number, ws=ws, ps=ps, name=name)
  return text, (PlanStep(str(number), op, str(factor), words),)


def _chain(rng, options, steps):
  """A chain of `steps` operations; None if this draw cannot be finished."""
  ops, limit = options.operations, options.max_number
  container, item = rng.choice(DOMAINS[rng.choice(tuple(DOMAINS))])
  words = {'name': rng.choice(NAMES), 'cs': plural(container), 'x': item,
           'xs': plural(item)}
  kinds = _kinds(rng, ops, steps)
  if kinds is None:
    return None
  a, b = rng.randint(2, limit), rng.randint(2, limit)
  plan, sentences = [], []
  if kinds[0] == 'product':
    sentences.append(_pick(rng, options, PRODUCT, a=a, b=b, **words))
    plan.append(PlanStep(str(a), '*', str(b), 'multiply the number of '
                         f'{words["cs"]} by the {words["xs"]} in each'))
  else:
    sentences.append(_pick(rng, options, COUNT, a=a, **words))
  question = None
  for kind in kinds[1:] if kinds[0] == 'product' else kinds:
    total = evaluate_plan(plan)[-1] if plan else Fraction(a)
    drawn = _event(rng, options, kind, total, words)
    if drawn is None:
      return None
    sentence, op, number, said = drawn
    plan.append(PlanStep(f'#{len(plan)}' if plan else str(a), op, str(number),
                         said))
    if kind in ('price', 'share'):
      question = sentence
    else:
      sentences.append(sentence)
  if steps == 1:
    extra = _pick(rng, options, IRRELEVANT, d=rng.randint(2, limit), **words)
    sentences.insert(rng.randint(0, len(sentences)), extra)
  sentences.append(question or _pick(rng, options, ASK, **words))
  return ' '.join(sentences), tuple(plan)


def _kinds(rng, ops, steps):
  """Which operations, in order: [product] events [price or share]."""
  events = [k for k, op in (('add', '+'), ('take', '-')) if op in ops]
  ends = [k for k, op in (('price', '*'), ('share', '/')) if op in ops]
  if steps == 1:
    return [rng.choice(['product'] * ('*' in ops) + events + ends)]
  product = '*' in ops and rng.random() < 0.6
  end = bool(ends) and rng.random() < 0.5
  middle = steps - product - end
  if (middle > 0 and not events) or middle < 0:
    return None
  return (['product'] * product + [rng.choice(events) for _ in range(middle)]
          + [rng.choice(ends)] * end)


def _event(rng, options, kind, total, words):
  """(sentence, operator, number, words without numbers), or None."""
  limit, xs = options.max_number, words['xs']
  number = rng.randint(2, limit)
  if kind == 'add':
    return (_pick(rng, options, ADD, c=number, **words), '+', number,
            f'add the {xs} that came later')
  if kind == 'take':
    if total <= 2:
      return None
    number = rng.randint(1, min(limit, int(total) - 1))
    return (_pick(rng, options, TAKE, c=number, **words), '-', number,
            f'subtract the {xs} that are gone')
  if kind == 'price':
    return (_pick(rng, options, PRICE, k=number, **words), '*', number,
            'multiply by the price of one')
  divisors = [k for k in range(2, limit + 1) if total % k == 0]
  if not divisors:
    return None
  number = rng.choice(divisors)
  return (_pick(rng, options, SHARE, k=number, **words), '/', number,
          'divide by the number of shares')
