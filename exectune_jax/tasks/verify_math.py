"""Is the core's final answer equal to the reference?

Three steps: find the final answer in the reply, compare plain numbers
exactly as fractions, and hand LaTeX to math-verify. Never raises for any
text, never calls a non-answer right: a hedge ("5 or 6"), a denial ("not 5")
or a bare number in the middle of a sentence is no answer.
"""

from __future__ import annotations

import re
from fractions import Fraction

from exectune_jax.episode import Verdict

MAX_REPLY_CHARS = 100_000  # what is read of a reply, from its end
MAX_NUMBER_CHARS = 60

NUMBER = re.compile(
    r'(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?')
_MARKER = re.compile(
    r'(?:final\s+answer|answer)\s*(?:is|:|=|would be)+:?\s*|####\s*',
    re.IGNORECASE)
# After the number only its unit may follow: some plain words.
_UNIT = re.compile(r"[%$]?(?:\s*[A-Za-z'/-]+(?:[²³]|\^[23])?){0,6}\s*")
_NOT_A_UNIT = re.compile(
    r'\b(?:or|not|no|times|plus|minus|less|more|half|quarter|dozen|hundred|'
    r'thousand|million|billion|to|and|but|maybe|multiplied|divided|squared|'
    r'cubed|e)\b', re.IGNORECASE)
_DOUBT = re.compile(r"\b(?:not|or|isn't|neither)\b", re.IGNORECASE)
_TAKEN_BACK = re.compile(r'\b(?:wait|wrong|incorrect|actually|instead|not)\b',
                         re.IGNORECASE)
_POWER = re.compile(r'[\d^{}().+*/ -]*\^[\d^{}().+*/ -]*')
_BARE = re.compile(rf'(?:^|=)\s*({NUMBER.pattern})\s*[A-Za-z%]*\s*\.?$')


def to_fraction(text: str) -> Fraction | None:
  """Exact value of a plain number ('-1,200.50', '$3', '3/4', '50%')."""
  text = text.strip().replace('$', '').rstrip('%.,; ')
  if re.fullmatch(r'[-+]?\d{1,3}(,\d{3})+(\.\d*)?(/\d+)?', text, re.ASCII):
    text = text.replace(',', '')
  if not text or len(text) > MAX_NUMBER_CHARS:
    return None
  if not re.fullmatch(r'[-+]?(\d+(\.\d*)?|\.\d+)(/\d+)?', text, re.ASCII):
    return None
  numerator, _, denominator = text.partition('/')
  if denominator and int(denominator) == 0:
    return None
  return Fraction(numerator) / Fraction(denominator or 1)


def extract_answer(text: str) -> str | None:
  """The final answer as written: a number, LaTeX, or None."""
  text = text[-MAX_REPLY_CHARS:].replace('**', '')
  boxed = text.rfind('\\boxed{')
  if boxed >= 0:
    denied = _DOUBT.search(text[max(0, boxed - 20):boxed])
    return None if denied else _boxed(text[boxed:])
  markers = list(_MARKER.finditer(text))
  if markers:
    sentence, _, rest = text[markers[-1].end():].partition('\n')
    return None if _TAKEN_BACK.search(rest) else _answer_in(sentence)
  lines = [line for line in text.strip().splitlines() if line.strip()]
  bare = _BARE.search(lines[-1].strip()) if lines else None
  if bare is None or _DOUBT.search(lines[-1]):
    return None
  return bare.group(1)


def verify(reference: str, text: str) -> Verdict:
  """Compares a reply with the reference answer."""
  answer = extract_answer(text)
  if answer is None:
    return Verdict(False)
  left, right = to_fraction(reference), to_fraction(answer)
  if left is not None and right is not None:
    return Verdict(left == right, answer)
  if '\\' in answer or '^' in answer or left is None:
    return Verdict(_equal_latex(reference, answer), answer)
  return Verdict(False, answer)


def _boxed(text: str) -> str | None:
  r"""Content of the \boxed{...} that text begins with; braces balance."""
  depth = 0
  for i in range(text.index('{'), len(text)):
    depth += (text[i] == '{') - (text[i] == '}')
    if depth == 0:
      inside = text[text.index('{') + 1:i].strip()
      return None if not inside or _DOUBT.search(inside) else inside[:200]
  return None


def _answer_in(line: str) -> str | None:
  """The answer that a marker phrase introduces, if it is one."""
  sentence, *after = re.split(r'[.;](?=\s|$)', line.strip(), maxsplit=1)
  if after and _TAKEN_BACK.search(after[0]):
    return None
  sentence = sentence.strip()
  if '\\' in sentence:
    value = sentence.strip('$').removeprefix('\\(').removesuffix('\\)')
    return None if _DOUBT.search(value) else value.strip()[:200]
  before, equals, last = sentence.rpartition('=')
  if equals and _DOUBT.search(before):
    return None
  last = last.strip()
  number = NUMBER.match(last)
  if number is None or _POWER.fullmatch(last):
    return last[:200] if _POWER.fullmatch(last) else None
  unit = last[number.end():]
  if not _UNIT.fullmatch(unit) or _NOT_A_UNIT.search(unit):
    return None
  return number.group()


def _equal_latex(reference: str, answer: str) -> bool:
  """By math-verify, which may take for ever on hostile LaTeX: graders run in
  processes that can be killed (rewards/graders.py)."""
  import math_verify  # sympy takes a second
  try:
    # Its own time limits are signals, which only a main thread can take.
    return bool(math_verify.verify(
        math_verify.parse(f'${reference}$', parsing_timeout=None),
        math_verify.parse(f'${answer}$', parsing_timeout=None),
        timeout_seconds=None))
  except Exception:  # noqa: BLE001 an unreadable answer is a wrong answer
    return False
