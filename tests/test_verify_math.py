
import pytest

from exectune_jax.tasks.verify_math import extract_answer, to_fraction, verify


@pytest.mark.parametrize('text', [
    'The answer is 18.', 'the answer is $18', 'Answer: 18', '#### 18',
    'So 6 * 3 = 18. The answer is 18 apples.', 'The final answer is **18**.',
    '6 * 3 = 18', '18', '$18.00', 'The answer is 6 * 3 = 18.',
    r'Thus \boxed{18}.', r'The answer is \(18\).', 'The answer is 18.0',
    'The answer is 36/2.', 'The answer is 5. Wait, no. The answer is 18.',
    r'The answer is \frac{36}{2}.', 'answer is +18',
    'The answer is: 18', 'The answer would be 18 dollars.',
    'The answer is 18 dollars per hour.', 'The answer is 18%.',
    'The answer is 18 m²', 'The answer is 18. I hope this helps!',
    'There are not many. The answer is 18', r'The answer is $\boxed{18}$',
])
def test_right_answers(text):
  assert verify('18', text).correct, extract_answer(text)


@pytest.mark.parametrize('text', [
    '', '   ', 'I do not know.', 'There are 18 apples in the box, I think',
    'The answer is not 18.', 'The answer is 18 or 19.',
    'The answer is 17 or 18.', 'The answer is between 17 and 18.',
    'The answer is 18-20.', 'The answer is 18, 19 or 20', '18 * 2',
    'The answer is 18 * 2', 'The answer is unknown; 18 items were given.',
    'The answer is 180.', 'The answer is -18.', 'The answer is 1.8', '18 or 19',
    'The answer is 18/0.', 'The answer is 18.5', 'The answer is eighteen-ish',
    'x' * 300_000, 'The answer is ' + '9' * 10_000, '\x00\ud800', '####',
    r'\boxed{', r'\boxed{17 \text{ or } 18}', 'The answer is 1e999999999',
    r'The answer is \frac{1}{0}.', 'The answer is 9^9^9^9^9^9.',
    'The answer is 18 to 20.',
    *(f'The answer is {x}' for x in (
        '18^2', '18²', '18e3', '18 million', '18 hundred', '18 1/2', '18 000',
        '18.000.000', '18!', '18:30', '18 times 10', '18 plus 3',
        '18 less than that', '18 feet 6 inches', '18 or maybe 6', '18 (or 6)',
        '$18$ or $6$', '18 apples or 6 apples', '18? No, it is 6.', 'not = 18',
        '18.\nWait, that is wrong. It is 6.', 'x = 5 or x = 18',
        '18. Actually, it is 6.', '18,6', '1,8', '18 x 2', '18 more',
        '18 and 6', '18dozen')),
    r'It is not \boxed{18}.', r'\boxed{18,6}', r'\boxed{1,8}', '18 or x = 18',
    'It is not = 18',
])
def test_wrong_or_no_answers_are_never_right(text):
  assert not verify('18', text).correct, extract_answer(text)


@pytest.mark.parametrize('text, value', [
    ('1,200', '1200'), ('-3/4', '-3/4'), ('$2.50', '5/2'), ('50%', '50'),
    ('1/0', None), ('', None), ('1e5', None), ('٣', None), ('9' * 61, None),
    ('12,', '12'), ('1,2', None), ('5,6', None), ('1,200.5', '2401/2'),
    ('abc', None), ('--5', None)])
def test_to_fraction(text, value):
  found = to_fraction(text)
  assert (None if found is None else str(found)) == value


def test_numbers_are_compared_exactly():
  assert not verify('0.3', 'The answer is 0.30000000000000004').correct
  assert verify('1/3', r'The answer is \frac{1}{3}').correct
  assert verify('0.5', r'\boxed{\frac{1}{2}}').correct


def test_text_answers_go_to_math_verify():
  assert verify(r'\sqrt{2}', r'\boxed{\sqrt{2}}').correct
  assert not verify(r'\sqrt{2}', r'\boxed{\sqrt{3}}').correct
