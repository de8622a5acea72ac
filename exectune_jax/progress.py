"""What a user sees while something long runs: rate, ETA, dollars so far.

On a terminal a bar; elsewhere (a log file, CI) a line every ten seconds.
"""

from __future__ import annotations

import contextlib
import sys
import time

import rich.console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeRemainingColumn)

console = rich.console.Console(highlight=False, soft_wrap=True)
LOG_EVERY_S = 10.0


_warned: set[str] = set()


def warn_once(about: str, text: str) -> None:
  """Says something about a config field, once a process."""
  if about not in _warned and not console.quiet:
    print(f'warning: {text}', file=sys.stderr, flush=True)
  _warned.add(about)


class _Lines:
  """Progress as plain lines."""

  def __init__(self, title: str, total: int, start: int):
    self.title, self.total, self.done = title, total, start
    self._first, self._began = start, time.monotonic()
    self._last = self._began

  def update(self, done: int, note: str):
    self.done = done
    now = time.monotonic()
    if now - self._last < LOG_EVERY_S and done < self.total:
      return
    self._last = now
    rate = (done - self._first) / max(now - self._began, 1e-9)
    eta = (self.total - done) / rate if rate else float('inf')
    print(f'{self.title}: {done}/{self.total}, {rate:.2f}/s, '
          f'{eta:.0f} s left, {note}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def track(title: str, total: int, start: int = 0, spent=lambda: 0.0):
  """Yields advance(n=1, note='').

  Args:
    title: what is being counted.
    total, start: how many there are, and how many are done already.
    spent: returns dollars spent so far.
  """
  done = start

  def note_text(note):
    return f'${spent():.4f} so far' + (f', {note}' if note else '')

  if not console.is_terminal:
    lines = _Lines(title, total, start)

    def advance(n: int = 1, note: str = ''):
      nonlocal done
      done += n
      if not console.quiet:  # one of several processes speaks
        lines.update(done, note_text(note))
    yield advance
    return
  columns = (TextColumn('{task.description}'), BarColumn(),
             MofNCompleteColumn(), TextColumn('{task.fields[rate]}'),
             TimeRemainingColumn(), TextColumn('{task.fields[note]}'))
  with Progress(*columns, console=console) as bar:
    began = time.monotonic()
    task = bar.add_task(title, total=total, completed=start, note='', rate='')

    def advance(n: int = 1, note: str = ''):
      nonlocal done
      done += n
      rate = (done - start) / max(time.monotonic() - began, 1e-9)
      bar.update(task, completed=done, note=note_text(note),
                 rate=f'{rate:.2f}/s')
    yield advance


def show_episode(episode, title: str = '') -> None:
  """Prints one episode: problem, strategy, answer, verdict, reward parts."""
  from rich.markup import escape
  e = episode
  strategy = (e.strategy.body or e.strategy.text) if e.strategy else '(none)'
  reply = e.execution.text if e.execution else '(not called)'
  right = 'right' if e.success else 'wrong'
  reference = 'reference ' + ' '.join(e.problem.answer.split())[:100]
  if e.problem.tests:  # a program: what became of it says more
    reference = e.verdict.extracted if e.verdict else 'not judged'
  if e.status != 'ok':
    reason = e.lost_reason or (e.strategy.fault if e.strategy else '')
    right = f'{e.status}: {reason}'
  console.print(f'[bold]{escape(title)}[/bold] {escape(e.problem.question)}')
  console.print(f'  strategy  {escape(strategy)}')
  console.print(f'  core      {escape(" ".join(reply.split())[:300])}')
  console.print(f'  verdict   {escape(right)} ({escape(reference)}, core alone '
                f'{"?" if e.base is None else f"{e.base:.2f}"})')
  if e.reward is not None:
    parts = ', '.join(f'{k} {v:+.3f}' for k, v in e.reward.parts.items() if v)
    console.print(f'  reward    {e.reward.total:.3f} ({parts})')
