"""The structure of a strategy: one tagged block and nothing else."""

from __future__ import annotations

from exectune_jax.episode import Strategy

OPEN, CLOSE = '<strategy>', '</strategy>'
MAX_CHARS = 8000  # longer is a solution or noise, never a short plan


def wrap(body: str) -> str:
  """The well-formed text whose body is `body`."""
  return f'{OPEN}{body.strip()}{CLOSE}'


def parse(text: str, tokens=(), logprobs=(), complete: bool = True) -> Strategy:
  """Reads a completion; a malformed one has `body=None` and says why.

  Args:
    text: decoded completion without the end token.
    tokens, logprobs: kept in the record as they are.
    complete: False when decoding ran out of tokens before the end token.
  """
  body, fault = None, _fault(text, complete)
  if not fault:
    body = text.strip()[len(OPEN):-len(CLOSE)].strip()
  return Strategy(text, body, fault, tuple(tokens), tuple(logprobs))


def _fault(text: str, complete: bool) -> str:
  """Why `text` is not exactly one non-empty strategy block ('' if it is)."""
  stripped = text.strip()
  if not complete:
    return 'truncated: no end token'
  if len(stripped) > MAX_CHARS:
    return f'too long: {len(stripped)} characters, at most {MAX_CHARS}'
  if stripped.count(OPEN) != 1 or stripped.count(CLOSE) != 1:
    return f'needs exactly one {OPEN}...{CLOSE} block'
  if not (stripped.startswith(OPEN) and stripped.endswith(CLOSE)):
    return 'text outside the strategy block'
  if not stripped[len(OPEN):-len(CLOSE)].strip():
    return 'empty strategy'
  return ''
