import random
import re
from fractions import Fraction

import pytest

from exectune_jax import teachers
from exectune_jax.errors import UserError
from exectune_jax.tasks import make_task
from exectune_jax.tasks.word_problems import FAMILIES, STEPS, evaluate_plan


def _task(config, **options):
  config.task.update(dict(families=FAMILIES, train_size=300, test_size=200,
                          validation_size=80), **options)
  return make_task(config.task)


def test_splits_are_disjoint_and_sized(config):
  task = _task(config)
  texts = {s: [p.question for p in task.problems(s)]
           for s in ('train', 'validation', 'test')}
  assert [len(texts[s]) for s in ('train', 'validation', 'test')] == [
      300, 80, 200]
  everything = sum(texts.values(), [])
  assert len(set(everything)) == len(everything)


def test_same_seed_same_problems_other_seed_others(config):
  one = [p.question for p in _task(config).problems('test')]
  two = [p.question for p in _task(config).problems('test')]
  other = [p.question for p in _task(config, seed=1).problems('test')]
  assert one == two
  assert len(set(one) & set(other)) < 0.1 * len(one)


def test_plans_give_the_answer_and_use_the_numbers_of_the_text(config):
  for p in _task(config).problems('train'):
    values = evaluate_plan(p.plan)
    assert Fraction(p.answer) == values[-1]
    assert values[-1].denominator == 1 and values[-1] > 0
    # an independent evaluation: the nested expression, by Python itself
    body = teachers.write(p, 'expression', random.Random(0))
    body = re.sub(r'</?strategy>', '', body)
    assert eval(re.sub(r'(\d+)', r'Fraction(\1)', body)) == values[-1]
    for step in p.plan:
      for operand in (step.left, step.right):
        stated = re.search(rf'\b{operand}\b', p.question)
        assert operand.startswith('#') or stated or p.tags == ('units',)


def test_families_have_their_number_of_steps(config):
  problems = _task(config, train_size=600).problems('train')
  seen = {p.tags[0] for p in problems}
  assert seen == set(FAMILIES)
  for p in problems:
    assert len(p.plan) == STEPS.get(p.tags[0], 1)
    numbers = re.findall(r'\d+', p.question)
    if p.tags == ('one_step',):
      assert len(numbers) == 3  # two operands and an irrelevant number


def test_options_are_obeyed(config):
  task = _task(config, max_number=9, operations='+*', wordings=1)
  for p in task.problems('train'):
    assert {s.op for s in p.plan} <= set('+*')
    assert max(int(n) for n in re.findall(r'\d+', p.question)) <= 9


@pytest.mark.parametrize('options, field', [
    ({'families': ('two_steps',)}, 'task.families'),
    ({'operations': '+%'}, 'task.operations'),
    ({'operations': ''}, 'task.operations'),
    ({'max_number': 1}, 'task.max_number'),
    ({'wordings': 9}, 'task.wordings'),
    ({'train_size': 10**5, 'families': ('units',), 'max_number': 5,
      'wordings': 1}, 'task.train_size'),
])
def test_impossible_options_name_the_field(config, options, field):
  with pytest.raises(UserError, match=re.escape(field)):
    _task(config, **options).problems('train')


def test_teacher_styles(config):
  problem = next(p for p in _task(config).problems('train')
                 if [s.op for s in p.plan] == ['+', '*'])
  a, b, c = problem.plan[0].left, problem.plan[0].right, problem.plan[1].right
  rng = random.Random(0)
  text = {s: teachers.write(problem, s, rng) for s in teachers.STYLES}
  assert text['steps'] == f'<strategy>{a} + {b} = ?, then ? * {c}</strategy>'
  assert text['expression'] == f'<strategy>({a} + {b}) * {c}</strategy>'
  assert text['named'] == (f'<strategy>Add {b} to {a}, then multiply the '
                           f'result by {c}.</strategy>')
  assert not re.search(r'\d', text['verbal'])
  assert text['reveals'].endswith(f'= {problem.answer}</strategy>')
  assert text['wrong'] != text['steps']
  assert {teachers.write(problem, 'loose', rng)[10:-11] for _ in range(40)} == {
      f'({x} + {y}) * {c}{stop}' for x, y in ((a, b), (b, a))
      for stop in ('', '.')}
  leaking = {s for s in text if _task(config).reveals_answer(
      problem, text[s][10:-11])}
  assert leaking == {'reveals'}
