"""Ctrl-C and SIGTERM: noted at once, obeyed at the next safe point.

The first signal sets a flag; loops call `check()` where everything is on
disk. A second Ctrl-C interrupts immediately.
"""

from __future__ import annotations

import signal
import sys

from exectune_jax.errors import Stopped

_seen: list[int] = []
_together = False


def install(together: bool = False) -> None:
  """Takes over SIGINT and SIGTERM (main thread only).

  together: one of several processes, which must stop at the same place:
    `check` then obeys only what they agreed on (hosts.agree).
  """
  global _together
  _together = together
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


def obeyed() -> None:
  """The signal has been answered in full: what follows may go on."""
  _seen.clear()


def check(agreed: bool | None = None) -> None:
  """Raises Stopped if a signal was seen.

  agreed: whether all processes know of it; None where they can't be asked.
  """
  if agreed or (agreed is None and _seen and not _together):
    raise Stopped(signal.Signals(_seen[0]).name if _seen
                  else 'a signal in another process')
