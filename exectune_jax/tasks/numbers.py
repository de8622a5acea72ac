"""Every number that a text states, in whatever notation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from exectune_jax.tasks.verify_math import NUMBER, to_fraction

_ONES = ('zero one two three four five six seven eight nine ten eleven twelve '
         'thirteen fourteen fifteen sixteen seventeen eighteen nineteen'
        ).split()
_TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()
_WORDS = {w: i for i, w in enumerate(_ONES)} | {
    w: 10 * i for i, w in enumerate(_TENS, start=2)}
_SCALES = {'hundred': 100, 'thousand': 1000, 'million': 10**6,
           'billion': 10**9}
_WORD = '|'.join([*_WORDS, *_SCALES])
_WORDS_RUN = re.compile(
    rf'\b(?:a\s+(?={"|".join(_SCALES)}))?(?:{_WORD})'
    rf'(?:(?:\s+and\s+|[\s-]+)(?:{_WORD}))*\b', re.IGNORECASE)
_GROUPED = re.compile(r"(?<![\w.])\d{1,3}(?:[ _'\u00a0\u2009\u202f]\d{3})+\b"
                      r'|(?<![\w.])\d(?: \d)+\b')
_NO_ZERO = re.compile(r'(?<![\w.])\.\d+')
_PERCENT = re.compile(r'\s*\\?%')
_SCIENTIFIC = re.compile(
    r'(?<![\w.])(\d+(?:\.\d+)?)\s*(?:e|(?:[*x×]|\\times|\\cdot)\s*10\s*\^)'
    r'\s*\{?([-+]?\d{1,2})', re.IGNORECASE)
_LATEX_FRACTION = re.compile(r'\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}')
_LITERAL = re.compile(r'\b0(?:x[0-9a-f]+|b[01]+|o[0-7]+)\b', re.IGNORECASE)


def plain_digits(text: str) -> str:
  """The text with digits of all scripts, and fraction signs, as ASCII."""
  def one(c):
    if c.isdecimal():
      return str(unicodedata.decimal(c))
    if unicodedata.decomposition(c).startswith('<fraction>'):
      return unicodedata.normalize('NFKC', c).replace('\u2044', '/')
    return c
  return text if text.isascii() else ''.join(map(one, text))


def stated(text: str) -> Iterator[tuple[Fraction, int]]:
  """(value, start) of every number in a text of `plain_digits`.

  Numerals with and without grouping, decimals, fractions, percentages,
  powers of ten, LaTeX fractions, hexadecimal and binary literals, digits one
  by one, and number words.
  """
  for match in NUMBER.finditer(text):
    value = to_fraction(match.group())
    if value is not None:
      yield value, match.start()
      if _PERCENT.match(text, match.end()):
        yield value / 100, match.start()
  for match in _NO_ZERO.finditer(text):
    yield Fraction(match.group()), match.start()
  for match in _GROUPED.finditer(text):
    yield Fraction(int(re.sub(r'\D', '', match.group()))), match.start()
  for match in _SCIENTIFIC.finditer(text):
    yield Fraction(match[1]) * Fraction(10) ** int(match[2]), match.start()
  for match in _LATEX_FRACTION.finditer(text):
    if int(match[2]):
      yield Fraction(int(match[1]), int(match[2])), match.start()
  for match in _LITERAL.finditer(text):
    yield Fraction(int(match.group(), 0)), match.start()
  for match in _WORDS_RUN.finditer(text):
    words = re.findall('[a-z]+', match.group().lower())
    for value in _spelled([w for w in words if w not in ('a', 'and')]):
      yield Fraction(value), match.start()


def _spelled(words: list[str]) -> Iterator[int]:
  """The numerals that a run of number words consists of."""
  if len(words) > 1 and all(_WORDS.get(w, 10) < 10 for w in words):
    yield int(''.join(str(_WORDS[w]) for w in words))  # digit by digit
  total = part = 0
  fresh = True  # no word of this numeral so far
  for word in words:
    value = _SCALES.get(word)
    if value == 100 and (fresh or 0 < part < 10):
      part = max(part, 1) * 100
    elif value:
      total, part = total + max(part, 1) * value, 0
    else:
      value = _WORDS[word]
      room = 10 if 0 < value < 10 and part % 100 >= 20 else 100
      if not fresh and (part % room or value == 0):  # a numeral of its own
        yield total + part
        total = part = 0
      part += value
    fresh = False
  if not fresh:
    yield total + part
