"""An in-process core with limited, documented skill: no key, no network.

It reads the prompt that any core reads, and nothing else. What it can do:

given                                  what it does
'A * B = ?, then ? + C'                each step is right with `step`
'(A * B + C) / D'                      every further operator in one line is
                                       right with `nested` only
'Multiply A by B, then add C'          each step is right with `named`
'Multiply the boxes by ...'            takes numbers from the problem in
                                       order, right with `verbal`; irrelevant
                                       ones confuse it
'... = 24', 'the answer is 24'         copies it
nothing usable, or no strategy         reads cue words, sentence by sentence,
                                       up to `reading` operations; picks up an
                                       irrelevant number with `distraction`

Asked for a Python program, it writes one that returns its answer.

Slips are seeded by the prompt (and the draw, above temperature 0): the same
request gets the same reply. Name: 'toy:small' or 'toy:large', with options:
'toy:small?latency_s=0.2&spread=0.9&failure_rate=0.1&seed=3'. Latencies are
lognormal: latency_s is the median, spread the deviation of their logarithm.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import random
import re
import urllib.parse
from fractions import Fraction

from exectune_jax.cores.base import (CoreReply, CoreRequest, Price,
                                     RetryableError)
from exectune_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Skill:
  """Probabilities of doing a thing right; reading counts operations."""
  step: float
  nested: float
  named: float
  verbal: float
  reading: int
  distraction: float
  facts: bool  # knows unit conversion factors
  price: Price


SKILLS = {
    'small': Skill(step=0.97, nested=0.6, named=0.7, verbal=0.5, reading=1,
                   distraction=0.6, facts=False, price=Price(0.1, 0.4)),
    'large': Skill(step=0.97, nested=0.95, named=0.95, verbal=0.9, reading=4,
                   distraction=0.1, facts=True, price=Price(2.0, 8.0)),
}

_FACTS = {('hours', 'minutes'): 60, ('minutes', 'seconds'): 60,
          ('weeks', 'days'): 7, ('days', 'hours'): 24, ('years', 'months'): 12,
          ('feet', 'inches'): 12, ('yards', 'feet'): 3,
          ('meters', 'centimeters'): 100, ('dozen', 'eggs'): 12}
_VERBS = (('*', r'\bmultipl'), ('/', r'\b(?:divide|split)'), ('+', r'\badd'),
          ('-', r'\b(?:subtract|take away)'))
_CUES = (  # the first that matches a sentence decides its operation
    ('/', r'equally|shared|split'),
    ('*', r'dollars'),
    ('*', r'in each|each one|every one'),
    ('-', r'gives away|lost|uses'),
    ('+', r'more|finds|brings'))
_NUMBER = re.compile(r'\d+(?:\.\d+)?')
_TOKEN = re.compile(r'\d+(?:\.\d+)?|[-+*/()?]|#\d+')
_OPERANDS = r'(?:#\d+|[\d.?()+*/\s-])*'
_EXPRESSION = re.compile(rf'{_OPERANDS}[-+*/]{_OPERANDS}')


class ToyCore:
  """See the module docstring for its skill."""

  def __init__(self, model: str):
    size, _, query = model.partition('?')
    options = dict(urllib.parse.parse_qsl(query))
    if size not in SKILLS:
      raise UserError(f"core.name='toy:{model}': the toy cores are "
                      f'{", ".join("toy:" + s for s in SKILLS)}')
    try:
      self.latency_s = float(options.pop('latency_s', 0))
      self.spread = float(options.pop('spread', 0))
      self.failure_rate = float(options.pop('failure_rate', 0))
      self.seed = int(options.pop('seed', 0))
    except ValueError as e:
      raise UserError(f"core.name='toy:{model}': {e}") from e
    if options:
      raise UserError(f"core.name='toy:{model}': unknown option "
                      f'{sorted(options)}; use latency_s, spread, '
                      'failure_rate, seed')
    self.name = f'toy:{model}'
    self.skill = SKILLS[size]
    self.price = self.skill.price
    self._tries = 0

  async def generate(self, request: CoreRequest) -> CoreReply:
    self._tries += 1
    seed = self._seed(request)
    latency_s = self.latency_s
    if self.spread:
      latency_s *= random.Random(f'wait/{seed}').lognormvariate(
          0, self.spread)
    if latency_s:
      await asyncio.sleep(latency_s)
    fate = random.Random(f'{self.seed}/{self._tries}')
    if fate.random() < self.failure_rate:
      raise RetryableError(f'{self.name}: injected failure', usd=0.0)
    rng = random.Random(seed)
    asked = dict(request.messages).get('system', '')
    text = _Solver(self.skill, rng).reply(request.messages[-1][1],
                                          'Python' in asked)
    words = re.findall(r'\w+|[^\w\s]', text)
    finish = 'stop'
    if len(words) > request.max_tokens:
      text, finish = ' '.join(words[:request.max_tokens]), 'length'
    n_in = sum(len(re.findall(r'\w+|[^\w\s]', t)) + 4
               for _, t in request.messages)
    n_out = min(len(words), request.max_tokens)
    return CoreReply(text, finish, n_in, n_out,
                     self.price.dollars(n_in, n_out), latency_s)

  async def stream(self, request: CoreRequest, on_text) -> CoreReply:
    """`generate`, told word by word."""
    reply = await self.generate(request)
    for piece in re.findall(r'\s*\S+|\s+$', reply.text):
      on_text(piece)
      await asyncio.sleep(0)
    return reply

  def _seed(self, request):
    text = f'{self.seed}/{request.sample}/{request.messages}'
    return hashlib.sha256(text.encode()).hexdigest()

  async def close(self):
    pass


class _Solver:
  """Answers one prompt; draws all luck from `rng`."""

  def __init__(self, skill: Skill, rng: random.Random):
    self.skill, self.rng = skill, rng

  def reply(self, prompt: str, program: bool = False) -> str:
    problem = re.search(r'Problem: (.*)', prompt)
    strategy = re.search(r'\nStrategy: (.*)', prompt)
    problem = problem.group(1) if problem else prompt
    steps = self._follow(problem, strategy.group(1)) if strategy else None
    if steps is None:
      steps = self._read(problem)
    if not steps:
      return 'I do not know how to solve this.'
    if program:
      lines = [f'# {text} = {_show(value)}' for text, value in steps]
      lines.append(f'return {_show(steps[-1][1])}')
      return '```python\ndef solve():\n  ' + '\n  '.join(lines) + '\n```'
    shown = ' '.join(f'{text} = {_show(value)}.' for text, value in steps)
    return f'{shown} The answer is {_show(steps[-1][1])}.'

  def _follow(self, problem: str, strategy: str):
    """Carries a strategy out; None if it holds nothing that can be."""
    stated = re.search(r'answer is (-?\d+(?:\.\d+)?)', strategy.lower())
    if stated:
      return [('As the strategy says, it', Fraction(stated.group(1)))]
    given = [Fraction(n) for n in _NUMBER.findall(problem)]
    steps, used = [], 0
    for clause in re.split(r', then |; |\. |, and then ', strategy):
      done = self._expression(clause, steps)
      if done is None:
        done, used = self._words(clause, steps, given, used)
      if done is not None:
        steps.append(done)
      if len(steps) > 12:
        break
    return steps or None

  def _expression(self, clause: str, steps):
    """'6 * 3 = ?' with ? the last result and #k the k-th one."""
    left, equals, right = clause.partition('=')
    match = _EXPRESSION.fullmatch(left.strip().rstrip('.'))
    if not match or not _NUMBER.search(left + '?'):
      return None
    tokens = _TOKEN.findall(left)
    values = []
    for t in tokens:
      if t == '?' or t.startswith('#'):
        k = int(t[1:]) - 1 if t != '?' else -1
        if not steps or k >= len(steps):
          return None
        values.append(steps[k][1])
      else:
        values.append(Fraction(t) if t[0].isdigit() else t)
    result = _evaluate(values)
    if result is None:
      return None
    shown = ' '.join(v if isinstance(v, str) else _show(v) for v in values)
    copied = _NUMBER.fullmatch(right.strip().rstrip('.'))
    if equals and copied:  # the strategy did the arithmetic
      return shown, Fraction(copied.group())
    operators = sum(isinstance(v, str) and v in '+-*/' for v in values)
    luck = self.skill.step * self.skill.nested ** max(0, operators - 1)
    return shown, self._slip(result, luck)

  def _words(self, clause: str, steps, given, used):
    """'multiply 6 by 3', or the verb alone with numbers from the problem."""
    op = next((o for o, cue in _VERBS if re.search(cue, clause.lower())), None)
    if op is None:
      return None, used
    numbers = [Fraction(n) for n in _NUMBER.findall(clause)]
    needed = 1 if steps else 2
    luck = self.skill.named
    if len(numbers) < needed:
      luck = self.skill.verbal
      numbers = given[used:used + needed]
      used += needed
      if len(numbers) < needed:
        return None, used
    left = steps[-1][1] if needed == 1 else numbers[0]
    right = numbers[-1] if needed == 1 else numbers[1]
    if needed == 2 and op == '-' and 'from' in clause and (
        luck == self.skill.named):
      left, right = right, left
    result = _evaluate([left, op, right])
    if result is None:
      return None, used
    return (f'{_show(left)} {op} {_show(right)}',
            self._slip(result, luck)), used

  def _read(self, problem: str):
    """The core alone: cue words, sentence by sentence."""
    converted = self._convert(problem)
    if converted is not None:
      return converted
    sentences = re.split(r'(?<=[.?]) ', problem)
    operations, start = [], None
    for sentence in sentences:
      numbers = [Fraction(n) for n in _NUMBER.findall(sentence)]
      op = next((o for o, cue in _CUES if re.search(cue, sentence.lower())),
                None)
      if not numbers:
        continue
      if op is None or (start is None and op in '+-'):
        fooled = self.rng.random() < self.skill.distraction
        if start is None and (fooled or not re.search(
            r'years old|windows|rained', sentence)):
          start = numbers[0]
        continue
      if op == '*' and len(numbers) == 2:
        start = numbers[0]
      operations.append((op, numbers[-1]))
    steps = []
    for op, number in operations[:self.skill.reading]:
      left = steps[-1][1] if steps else start
      if left is None:
        return None
      result = _evaluate([left, op, number])
      if result is None:
        return None
      steps.append((f'{_show(left)} {op} {_show(number)}',
                    self._slip(result, self.skill.step)))
    return steps

  def _convert(self, problem: str):
    """Unit conversion from general knowledge, where the core has any."""
    units = [u for pair in _FACTS for u in pair]
    found = re.findall(rf"\b({'|'.join(sorted(set(units)))})\b", problem)
    number = _NUMBER.search(problem)
    if len(found) < 2 or number is None:
      return None
    if not self.skill.facts:
      return [(number.group(), Fraction(number.group()))]
    a = Fraction(number.group())
    target = re.search(r'how many (\w+)', problem.lower())
    for (whole, part), factor in _FACTS.items():
      if {whole, part} == set(found) and target:
        op = '*' if target.group(1) == part else '/'
        result = _evaluate([a, op, Fraction(factor)])
        return [(f'{_show(a)} {op} {factor}',
                 self._slip(result, self.skill.step))]
    return None

  def _slip(self, value: Fraction, luck: float) -> Fraction:
    if self.rng.random() < luck:
      return value
    return value + self.rng.choice((-10, -2, -1, 1, 2, 10))


def _show(value: Fraction) -> str:
  return (str(value.numerator) if value.denominator == 1
          else f'{value.numerator}/{value.denominator}')


def _evaluate(tokens) -> Fraction | None:
  """Value of numbers and '+-*/()' with the usual precedence, or None."""
  tokens = list(tokens)

  def atom():
    token = tokens.pop(0)
    if token == '(':
      value = total()
      if tokens.pop(0) != ')':
        raise ValueError('bracket')
      return value
    if isinstance(token, str):
      raise ValueError(token)
    return token

  def product():
    value = atom()
    while tokens and tokens[0] in ('*', '/'):
      op, right = tokens.pop(0), atom()
      value = value * right if op == '*' else value / right
    return value

  def total():
    value = product()
    while tokens and tokens[0] in ('+', '-'):
      op, right = tokens.pop(0), product()
      value = value + right if op == '+' else value - right
    return value

  try:
    value = total()
  except (ValueError, IndexError, ZeroDivisionError, RecursionError):
    return None
  return None if tokens or abs(value) > 10**12 else value
