"""Programs in replies, and programs hidden in strategies.

What a program does is found out in tasks/sandbox.py; here it is only read.
"""

from __future__ import annotations

import ast
import re
import textwrap

MAX_REPLY_CHARS = 100_000
MAX_PROGRAM_CHARS = 50_000
_FENCED = re.compile(r'``` ?(?:python3?|py)? ?\n(.*?)(?:```|\Z)',
                     re.DOTALL | re.IGNORECASE)
_STATEMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.While,
               ast.If, ast.With, ast.Return, ast.Import, ast.ImportFrom,
               ast.FunctionDef, ast.ClassDef)


def extract_program(text: str, setup: str = '', entry_point: str = '') -> str:
  """The program that a reply ends on.

  The last fenced block that defines `entry_point`, or else the last block,
  or else the whole reply. A block that is indented goes on where `setup`
  ends, as a completion of its last function.
  """
  text = text[:MAX_REPLY_CHARS]
  blocks = _FENCED.findall(text) or [text]
  defines = rf'^[ \t]*(?:async +)?(?:def|class) +{re.escape(entry_point)}\b'
  named = [b for b in blocks if re.search(defines, b, re.MULTILINE)]
  code = (named or blocks)[-1][:MAX_PROGRAM_CHARS]
  if not named and code.strip() and code.lstrip('\n')[0] in ' \t':
    return f'{setup}\n{code}'
  return textwrap.dedent(code)


def contains_program(strategy: str, reference: str) -> bool:
  """Whether a strategy gives the whole program instead of a way to it.

  True for a definition or a fenced block; for three statements with a
  `return` among them, or as few as the reference has, if what is returned is
  computed there; and for most of the reference's own lines. A call or an
  expression alone is a step.
  """
  if re.search(r'```|\b(?:def\s+\w+\s*\(|lambda\b.*:)', strategy):
    return True
  parts = re.split(r'[\n;]|(?<=:) (?=\w)|(?<=[.:]) ', strategy)
  found = [s for s in map(_statement, parts) if s is not None]
  own = _lines(reference)
  returns = [s.value for s in found if isinstance(s, ast.Return)]
  if returns and (len(found) >= 3 or len(found) >= len(own) and not isinstance(
      returns[-1], ast.Name | ast.Constant | None)):
    return True
  squeezed = re.sub(r'\s', '', strategy)
  return bool(own) and sum(line in squeezed for line in own) * 2 > len(own)


def _statement(part: str) -> ast.stmt | None:
  """What a part of a text says as Python, if that does something."""
  part = re.sub(r'^(?:[-*]|\d+[.)])\s+', '', part.strip()).strip('` ')
  for source in (part, f'{part} pass'):
    try:
      body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      continue
    if len(body) == 1 and isinstance(body[0], _STATEMENTS):
      return body[0]
  return None


def _lines(reference: str) -> list[str]:
  """Lines of a reference program that no other program would have."""
  lines = (re.sub(r'\s', '', line.partition('#')[0])
           for line in reference.splitlines())
  return [line for line in lines if len(line) >= 8 and not line.startswith(
      ('def', 'import', 'from', 'class', '"""', '>>>', '@'))]
