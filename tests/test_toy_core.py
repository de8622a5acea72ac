import asyncio
import math
import random

import pytest

from exectune_jax import prompts, strategy, teachers
from exectune_jax.cores.base import CoreRequest, Price, RetryableError
from exectune_jax.cores.toy import SKILLS, ToyCore
from exectune_jax.errors import UserError
from exectune_jax.tasks import make_task


def ask(question, plan=None, name='small', **request):
  request = {'temperature': 0.0, 'max_tokens': 100, **request}
  return asyncio.run(ToyCore(name).generate(CoreRequest(
      prompts.math_core_messages(question, plan), **request)))


@pytest.mark.parametrize('plan, shown', [
    ('6 * 3 = ?, then ? + 4', '6 * 3 = 18. 18 + 4 = 22. The answer is 22.'),
    ('6 * 3; #1 + 4; #1 + #2', '6 * 3 = 18. 18 + 4 = 22. 18 + 22 = 40. '
     'The answer is 40.'),
    ('6 * 3 = 18, then 18 + 4 = 22', '6 * 3 = 18. 18 + 4 = 22. The answer is '
     '22.'),
    ('Multiply 6 by 3, then subtract 4 from the result.',
     '6 * 3 = 18. 18 - 4 = 14. The answer is 14.'),
    ('The answer is 41', 'As the strategy says, it = 41. The answer is 41.'),
])
def test_follows_explicit_strategies(plan, shown, monkeypatch):
  sure = SKILLS['small'].__class__(step=1, nested=1, named=1, verbal=1,
                                   reading=1, distraction=0, facts=False,
                                   price=Price(0.1, 0.4))
  monkeypatch.setitem(SKILLS, 'small', sure)
  assert ask('A has 2 pens.', plan).text == shown


@pytest.mark.parametrize('style, expected', [
    ('steps', 'step'), ('named', 'named'), ('expression', 'nested')])
def test_measured_skill_is_the_documented_one(config, style, expected):
  """Two-step problems, 300 draws: within four standard errors."""
  config.task.update(families=('two_step',), train_size=300, max_number=30)
  skill = SKILLS['small']
  right = []
  for p in make_task(config.task).problems('train'):
    body = strategy.parse(teachers.write(p, style, random.Random(0))).body
    text = ask(p.question, body).text
    right.append(text.endswith(f'The answer is {p.answer}.'))
  chance = {'step': skill.step ** 2, 'named': skill.named ** 2,
            'nested': skill.step * skill.nested}[expected]
  error = math.sqrt(chance * (1 - chance) / 300)
  assert abs(sum(right) / 300 - chance) < 4 * error


def test_same_prompt_same_slips_but_draws_differ():
  replies = {ask('q 5 and 7', '5 + 7; #1 * 9; #2 - 3; #3 * 2', sample=i).text
             for i in [0] * 5}
  assert len(replies) == 1
  drawn = {ask('q 5 and 7', 'Multiply 5 by 7.', sample=i,
               temperature=1.0).text for i in range(40)}
  assert len(drawn) > 2


@pytest.mark.parametrize('plan', [
    '', '((((', '1 / 0', '? + ?', '#9 + 1', '* * *', '9' * 400, 'then ' * 500,
    '1 +' * 300 + ' 1', '(' * 3000 + '1', '\x00', '#0 + 1', '2 * 2 = 5 = 7'])
def test_hostile_strategies_get_some_reply(plan):
  assert isinstance(ask('Ada has 3 pens.', plan).text, str)


def test_tokens_price_limit_and_names():
  reply = ask('Ada has 3 pens.', '3 + 4', max_tokens=5)
  assert (reply.finish, reply.output_tokens) == ('length', 5)
  reply = ask('Ada has 3 pens.', '3 + 4')
  # "3 + 4 = 7. The answer is 7." is 6 + 5 words and signs
  assert (reply.finish, reply.output_tokens) == ('stop', 11)
  assert reply.usd == pytest.approx(
      (reply.input_tokens * 0.1 + 11 * 0.4) / 1e6)
  for bad in ('tiny', 'small?speed=2', 'small?latency_s=x'):
    with pytest.raises(UserError, match='core.name'):
      ToyCore(bad)


def test_injected_failures_have_their_rate():
  core = ToyCore('small?failure_rate=0.3&seed=1')
  request = CoreRequest((('user', 'Problem: x'),), 0.0, 10)
  failed = 0
  for _ in range(500):
    try:
      asyncio.run(core.generate(request))
    except RetryableError:
      failed += 1
  assert 110 < failed < 190
