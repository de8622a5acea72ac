"""Every reply that was ever paid for: cache, bill and resume state in one.

One SQLite file in WAL mode. A reply is committed before anyone sees it, so
a crash never makes us pay twice. Several processes may share the file: a
call that one of them has in flight is not made by another, and the budget
counts what all of them have spent and have in flight.

  python -m exectune_jax.cores.ledger show|spend|export DIR
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import secrets
import sqlite3
import threading
import time

from exectune_jax import files
from exectune_jax.cores.base import CoreReply, CoreRequest, clean
from exectune_jax.errors import BudgetExhausted, UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
  key TEXT PRIMARY KEY, core TEXT, stage TEXT, created REAL, request TEXT,
  text TEXT, finish TEXT, input_tokens INTEGER, output_tokens INTEGER,
  usd REAL, latency_s REAL) WITHOUT ROWID;
"""
# What later versions added, one entry a version (PRAGMA user_version).
_MIGRATIONS = ("""
ALTER TABLE calls ADD COLUMN cached_tokens INTEGER DEFAULT 0;
ALTER TABLE calls ADD COLUMN thinking_tokens INTEGER DEFAULT 0;
ALTER TABLE calls ADD COLUMN estimated INTEGER DEFAULT 0;
CREATE TABLE flights (
  key TEXT PRIMARY KEY, owner TEXT, created REAL, core TEXT, stage TEXT,
  usd REAL) WITHOUT ROWID;
CREATE TABLE failed (
  created REAL, core TEXT, stage TEXT, reason TEXT, usd REAL);
CREATE TABLE total (usd REAL);
INSERT INTO total SELECT COALESCE(SUM(usd), 0.0) FROM calls;
""", """
CREATE TABLE reused (
  run TEXT, key TEXT, usd REAL, PRIMARY KEY (run, key)) WITHOUT ROWID;
""", """
CREATE TABLE outbox (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT, key);
CREATE TABLE segments (name TEXT PRIMARY KEY) WITHOUT ROWID;
""", """
ALTER TABLE failed ADD COLUMN at_most REAL;
ALTER TABLE total ADD COLUMN unknown REAL DEFAULT 0.0;
""")
_REPLY = ('text, finish, input_tokens, output_tokens, usd, latency_s, '
          'cached_tokens, thinking_tokens, estimated')
KILLED = 'killed while in flight'

_open: set[str] = set()  # owners of this process


def path_of(config, workdir: pathlib.Path, host: int = 0) -> pathlib.Path:
  """Where a run's ledger is; each of several processes has its own."""
  here = config.ledger and not files.is_url(config.ledger)  # or bucket.py's
  path = pathlib.Path(config.ledger).expanduser() if here else (
      workdir / 'ledger.sqlite')
  return path.with_suffix(f'.{host}.sqlite') if host else path


def stage_of(config, stage: str) -> str:
  """What the bill calls a stage of this run."""
  return f'{config.run}/{stage}' if config.run else stage


class Ledger:
  """Opens or creates the ledger of a workdir.

  Args:
    path: the SQLite file.
    budget_usd: hard limit on the sum of all replies, those of earlier runs
      included, and on the most that tries of unknown cost can have cost; 0
      means no limit.
  """

  def __init__(self, path: str | pathlib.Path, budget_usd: float = 0.0):
    self.path, self.budget_usd = pathlib.Path(path), budget_usd
    self.budget_name = f'budget_usd={budget_usd:g}'  # for the error
    self.owner = f'{os.getpid()}.{_born(os.getpid())}.{secrets.token_hex(4)}'
    self._lock = threading.RLock()
    self._soon: list[tuple[asyncio.Future, tuple]] = []
    self._mine: set[str] = set()  # calls that this ledger has in flight
    try:
      self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None,
                                 check_same_thread=False)
      self._db.execute('PRAGMA journal_mode=WAL')
      self._db.execute('PRAGMA synchronous=NORMAL')
    except sqlite3.Error as e:
      raise self._error(e, 'move the file away to start a new one') from e
    with self.transaction() as db:
      db.execute(_SCHEMA)
      version = db.execute('PRAGMA user_version').fetchone()[0]
      for script in _MIGRATIONS[version:]:
        for statement in filter(str.strip, script.split(';')):
          db.execute(statement)
      db.execute(f'PRAGMA user_version={len(_MIGRATIONS)}')
      self._bury(db)
    _open.add(self.owner)

  def get(self, key: str) -> CoreReply | None:
    with self._lock:
      try:
        row = self._db.execute(f'SELECT {_REPLY} FROM calls WHERE key=?',
                               (key,)).fetchone()
      except sqlite3.Error as e:
        raise self._error(e) from e
    return CoreReply(*row[:-1], bool(row[-1])) if row else None

  def reuse(self, key: str, run: str) -> None:
    """Notes that a run uses a reply that another one has paid for."""
    with self.transaction() as db:
      db.execute('INSERT OR IGNORE INTO reused SELECT ?, key, usd FROM calls '
                 'WHERE key=? AND substr(stage, 1, ?) != ?',
                 (run, key, len(run) + 1, f'{run}/'))

  def begin(self, key: str, core: str, stage: str, worst_usd: float) -> bool:
    """Notes that a try starts; False if somebody is at this call already.

    Args:
      worst_usd: the most that the try can cost, set aside until it ends.

    Raises:
      BudgetExhausted: it could pass the budget.
    """
    with self.transaction() as db:
      held = db.execute('SELECT owner FROM flights WHERE key=?',
                        (key,)).fetchone()
      if held and self._holds(key, held[0]):
        return False
      if held or not self._affordable(db, worst_usd):
        self._bury(db)  # the dead may hold this call, or money
        if not self._affordable(db, worst_usd):
          doubt = (f', up to {self.in_doubt_usd:.4f} more by tries whose cost '
                   'nobody told' if self.in_doubt_usd else '')
          raise BudgetExhausted(
              f'{self.budget_name}: {self.spent_usd:.4f} dollars are spent'
              f'{doubt}, and the next core call could exceed the budget; raise '
              '--config.budget_usd and run the same command to go on')
      db.execute('INSERT INTO flights VALUES (?,?,?,?,?,?)',
                 (key, self.owner, time.time(), core, stage, worst_usd))
    self._mine.add(key)
    return True

  def put(self, key: str, core: str, stage: str, request: CoreRequest,
          reply: CoreReply) -> None:
    """Ends a try with a reply; the first one under a key stays."""
    self._put_all([(key, core, stage, request, reply)])

  def put_soon(self, *put) -> asyncio.Future:
    """`put`, in one transaction with all others of this turn of the loop.

    Done once it is committed; not undone if the future is cancelled.
    """
    loop = asyncio.get_running_loop()
    if not self._soon:
      loop.call_soon(self._put_waiting)
    self._soon.append((loop.create_future(), put))
    return self._soon[-1][0]

  def _put_waiting(self) -> None:
    waiting, self._soon = self._soon, []
    error = None
    try:
      self._put_all([put for _, put in waiting])
    except Exception as e:  # noqa: BLE001 each waiter raises it
      error = e
    for future, _ in waiting:
      if not future.cancelled():
        future.set_exception(error) if error else future.set_result(None)

  def _put_all(self, puts) -> None:
    # Whatever comes of it: these tries have ended.
    self._mine.difference_update(put[0] for put in puts)
    with self.transaction() as db:
      for key, core, stage, request, reply in puts:
        row = (key, core, stage, time.time(),
               clean(json.dumps(request.messages, ensure_ascii=False)),
               reply.text,
               reply.finish, reply.input_tokens, reply.output_tokens,
               reply.usd, reply.latency_s, reply.cached_tokens,
               reply.thinking_tokens, int(reply.estimated))
        done = db.execute(
            'INSERT OR IGNORE INTO calls (key, core, stage, created, request, '
            f'{_REPLY}) VALUES ({",".join("?" * len(row))})', row)
        if done.rowcount:
          db.execute('UPDATE total SET usd = usd + ?', (reply.usd,))
        db.execute('DELETE FROM flights WHERE key=?', (key,))

  def fail(self, key: str, core: str, stage: str, reason: str,
           usd: float | None) -> None:
    """Ends a try without a reply.

    usd: what it cost all the same; None where nobody can know.
    """
    self._mine.discard(key)
    with self.transaction() as db:
      held = db.execute('SELECT usd FROM flights WHERE key=?',
                        (key,)).fetchone()
      db.execute('DELETE FROM flights WHERE key=?', (key,))
      self._lose(db, core, stage, reason, usd, held[0] if held else 0.0)

  @property
  def spent_usd(self) -> float:
    """Dollars of all replies, and of failed tries where they are known."""
    return self.rows('SELECT usd FROM total')[0]['usd']

  @property
  def in_doubt_usd(self) -> float:
    """The most that tries whose cost nobody told can have cost."""
    return self.rows('SELECT unknown FROM total')[0]['unknown']

  def count(self) -> int:
    with self._lock:
      return self._db.execute('SELECT COUNT(*) FROM calls').fetchone()[0]

  def rows(self, query: str, *values):
    """Rows of a SELECT as sqlite3.Row, for reports."""
    with self._lock:
      cursor = self._db.cursor()
      cursor.row_factory = sqlite3.Row
      try:
        return cursor.execute(query, values).fetchall()
      except sqlite3.Error as e:
        raise self._error(e) from e

  def close(self) -> None:
    with self._lock:
      _open.discard(self.owner)
      self._db.close()

  def _affordable(self, db, usd: float) -> bool:
    """Whether budget is left beside what is spent and in flight."""
    if not self.budget_usd:
      return True
    spent, flying = db.execute(
        'SELECT usd + unknown, (SELECT COALESCE(SUM(usd), 0) FROM flights) '
        'FROM total').fetchone()
    return spent + flying + usd <= self.budget_usd

  def _bury(self, db) -> None:
    """Moves tries of processes that died to the failed ones."""
    for key, owner, core, stage, usd in db.execute(
        'SELECT key, owner, core, stage, usd FROM flights').fetchall():
      if not self._holds(key, owner):
        db.execute('DELETE FROM flights WHERE key=?', (key,))
        self._lose(db, core, stage, KILLED, None, usd)

  def _holds(self, key: str, owner: str) -> bool:
    """Whether a call is in flight still, and not left over by a process that
    died or by a reply of ours that could not be written."""
    return key in self._mine if owner == self.owner else _alive(owner)

  def _lose(self, db, core, stage, reason, usd, at_most) -> None:
    """Notes a try without a reply, its cost or the most that it can be."""
    at_most = at_most if usd is None else None
    db.execute('INSERT INTO failed VALUES (?,?,?,?,?,?)',
               (time.time(), core, stage, reason[:500], usd, at_most))
    db.execute('UPDATE total SET usd = usd + ?, unknown = unknown + ?',
               (usd or 0.0, at_most or 0.0))

  @contextlib.contextmanager
  def transaction(self):
    """Yields the connection; all of it is committed, or none."""
    with self._lock:
      try:
        self._db.execute('BEGIN IMMEDIATE')
        try:
          yield self._db
        except BaseException:
          if self._db.in_transaction:
            self._db.execute('ROLLBACK')
          raise
        self._db.execute('COMMIT')
      except sqlite3.Error as e:
        if self._db.in_transaction:  # a COMMIT that found the disk full
          with contextlib.suppress(sqlite3.Error):
            self._db.execute('ROLLBACK')
        raise self._error(e, 'free some space or mend the disk, and run the '
                          'same command again') from e

  def _error(self, e, fix='move the file away to start a new one'):
    return UserError(f'ledger {self.path}: {e}; {fix}')


def _born(pid: int) -> str:
  """When a process began, for a pid alone may be another's by now; '' where
  the system does not say."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text()
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return ''
  return f'{boot[:8]}-{stat.rpartition(")")[2].split()[19]}'  # proc(5): 22


def _alive(owner: str) -> bool:
  """Whether the process that opened a ledger under this name still runs."""
  pid, *born, _ = owner.split('.')
  pid = int(pid)
  if pid == os.getpid():
    return owner in _open
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return not any(born) or _born(pid) in ('', *born)


if __name__ == '__main__':
  from exectune_jax.cores import bill
  bill.run()
