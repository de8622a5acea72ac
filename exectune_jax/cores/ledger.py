"""Every reply that was ever paid for: cache, bill and resume state in one.

One SQLite file in WAL mode. A reply is committed before anyone sees it, so
a crash never makes us pay twice. Safe to open from several processes.
"""

from __future__ import annotations

import json
import pathlib
import sqlite3
import threading
import time

from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.errors import BudgetExhausted, UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
  key TEXT PRIMARY KEY, core TEXT, stage TEXT, created REAL, request TEXT,
  text TEXT, finish TEXT, input_tokens INTEGER, output_tokens INTEGER,
  usd REAL, latency_s REAL) WITHOUT ROWID
"""
_REPLY = 'text, finish, input_tokens, output_tokens, usd, latency_s'


class Ledger:
  """Opens or creates the ledger of a workdir.

  Args:
    path: the SQLite file.
    budget_usd: hard limit on the sum of all replies, those of earlier runs
      included; 0 means no limit.
  """

  def __init__(self, path: str | pathlib.Path, budget_usd: float = 0.0):
    self.path, self.budget_usd = pathlib.Path(path), budget_usd
    self._lock = threading.Lock()
    self._reserved = 0.0
    try:
      self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None,
                                 check_same_thread=False)
      self._db.execute('PRAGMA journal_mode=WAL')
      self._db.execute('PRAGMA synchronous=NORMAL')
      self._db.execute(_SCHEMA)
      self._spent = self._db.execute(
          'SELECT COALESCE(SUM(usd), 0) FROM calls').fetchone()[0]
    except sqlite3.Error as e:
      raise UserError(f'ledger {self.path}: {e}; move the file away to start '
                      'a new one') from e

  def get(self, key: str) -> CoreReply | None:
    with self._lock:
      row = self._db.execute(f'SELECT {_REPLY} FROM calls WHERE key=?',
                             (key,)).fetchone()
    return CoreReply(*row) if row else None

  def put(self, key: str, core: str, stage: str, request: CoreRequest,
          reply: CoreReply) -> None:
    """Commits a reply; the first one under a key stays."""
    row = (key, core, stage, time.time(),
           json.dumps(request.messages, ensure_ascii=False), reply.text,
           reply.finish, reply.input_tokens, reply.output_tokens, reply.usd,
           reply.latency_s)
    with self._lock:
      try:
        done = self._db.execute('INSERT OR IGNORE INTO calls VALUES '
                                '(?,?,?,?,?,?,?,?,?,?,?)', row)
      except sqlite3.Error as e:
        raise UserError(f'ledger {self.path}: cannot write: {e}; free some '
                        'space and run the same command again') from e
      self._spent += reply.usd if done.rowcount else 0.0

  @property
  def spent_usd(self) -> float:
    """Dollars of all replies in the file when opened, and since by us."""
    return self._spent

  def reserve(self, usd: float) -> None:
    """Sets dollars aside for a call in flight.

    Raises:
      BudgetExhausted: spent, reserved and this call would pass the budget.
    """
    with self._lock:
      total = self._spent + self._reserved + usd
      if self.budget_usd and total > self.budget_usd:
        raise BudgetExhausted(
            f'budget_usd={self.budget_usd:g}: {self._spent:.4f} dollars are '
            'spent and the next core call could exceed the budget; raise '
            '--config.budget_usd and run the same command to go on')
      self._reserved += usd

  def release(self, usd: float) -> None:
    with self._lock:
      self._reserved -= usd

  def count(self) -> int:
    with self._lock:
      return self._db.execute('SELECT COUNT(*) FROM calls').fetchone()[0]

  def close(self) -> None:
    with self._lock:
      self._db.close()
