"""Ctrl-C and SIGTERM: noted at once, obeyed at the next safe point.

The first signal sets a flag; loops call `check()` where everything is on
disk. A second Ctrl-C interrupts immediately.
"""

from __future__ import annotations

import signal
import sys

from exectune_jax.errors import Stopped

_seen: list[int] = []


def install() -> None:
  """Takes over SIGINT and SIGTERM (main thread only)."""
  _seen.clear()
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, _note)


def _note(number, _frame):
  if _seen and number == signal.SIGINT:
    raise KeyboardInterrupt
  _seen.append(number)
  print('\nstopping at the next safe point (Ctrl-C again: at once)',
        file=sys.stderr, flush=True)


def requested() -> bool:
  return bool(_seen)


def check() -> None:
  """Raises Stopped if a signal was seen."""
  if _seen:
    raise Stopped(signal.Signals(_seen[0]).name)
