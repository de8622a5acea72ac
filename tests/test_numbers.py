"""The answer's value in a strategy, in whatever notation."""

import pytest

from exectune_jax.episode import Problem
from exectune_jax.tasks import make_task


@pytest.mark.parametrize('question, answer, strategy, leaks', [
    ('Ada has 3 pens and 4 cups.', '12', '3 * 4', False),
    ('Ada has 3 pens and 4 cups.', '12', '3 * 4 = 12', True),
    ('Ada has 3 pens and 4 cups.', '12', 'You get twelve.', True),
    ('Ada has 3 pens and 4 cups.', '12', 'It is 12.0', True),
    ('Ada has 3 pens and 4 cups.', '12', '3 * 4 = ?', False),
    ('Ada has 3 pens and 4 cups.', '12', '120 / 10', False),
    ('Half of 8 of 4 pens', '4', '8 / 2', False),
    ('Half of 8 of 4 pens', '4', '8 / 2; compare with 4', False),
    ('Half of 8 of 4 pens', '4', '8 / 2 = 4', True),
    ('Half of 8 of 4 pens', '4', 'The answer is 4', True),
    ('Half of 8 of 4 pens', '4', 'answer: **4**', True),
    ('x', '1200', 'about 1,200', True), ('x', '42', 'forty-two', True),
    ('x', '42', 'forty two', True), ('x', '40', 'forty-two', False)])
def test_leak_check(config, question, answer, strategy, leaks):
  task = make_task(config.task)
  assert task.reveals_answer(Problem('p', question, answer),
                             strategy) is leaks




@pytest.mark.parametrize('answer, strategy', [
    ('140', text) for text in (
        '140', '140.0', '140.', '+140', '$140', '280/2', '1 4 0',
        '\uff11\uff14\uff10', '\u0661\u0664\u0660', '0x8c', '0b10001100',
        '1.4e2', '14E1', '1.4 x 10^2', r'1.4 \times 10^{2}', '14 * 10^1',
        'one hundred forty', 'One hundred and forty', 'a hundred and forty',
        'one-four-zero', 'one four zero', r'$\frac{280}{2}$', '**140**',
        'write 140, please', r'\boxed{140}')] + [
    ('1400', text) for text in (
        '1,400', '1 400', '1_400', "1'400", '1\u202f400', 'fourteen hundred',
        'one thousand four hundred')] + [
    ('0.5', text) for text in ('1/2', '.50', '50%', r'50 \%', '\u00bd')] + [
    ('19', 'nineteen'), ('90', 'ninety'), ('2005', 'two thousand five'),
    ('325601', 'three hundred twenty-five thousand six hundred and one'),
    ('0', 'zero')])
def test_leaks_in_any_notation(config, answer, strategy):
  task = make_task(config.task)
  assert task.reveals_answer(Problem('p', 'How many?', answer),
                             f'First {strategy}')


@pytest.mark.parametrize('answer, strategy', [
    ('140', 'Multiply 14 by the tens'), ('140', '14 * 5 * 2'),
    ('140', 'one of four, then zero'), ('9', 'nineteen'), ('5', '0.5'),
    ('400', '1 400'), ('14', 'fourteen hundred'), ('6', '5 and 1'),
    ('42', '4 2 7'), ('10', '10% of the price is lost')])
def test_other_numbers_are_no_leak(config, answer, strategy):
  task = make_task(config.task)
  question = 'What is 10 and 400 and 14 ?'
  assert not task.reveals_answer(Problem('p', question, answer), strategy)
