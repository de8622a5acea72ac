"""A ledger's rows in a bucket, as segments that are written once.

The ledger stays SQLite on this machine. Triggers note each new row in an
outbox, in the very transaction that commits it; `ship` writes what is there
as one small file of JSON lines, and only then forgets it. A crash in between
ships rows twice, which `restore` sees.
"""

from __future__ import annotations

import json
import pathlib

from exectune_jax import files
from exectune_jax.cores.ledger import Ledger

PAID_TWICE = 'paid twice: another machine had the same reply'

ROWS = 2000  # of one segment, at most
_NOTE = """
CREATE TRIGGER IF NOT EXISTS note_{table} AFTER INSERT ON {table} BEGIN
  INSERT INTO outbox (source, key) VALUES ('{table}', {key}); END"""
_KEYS = {'calls': '{0}key', 'failed': '{0}rowid',
         'reused': "{0}run || ' ' || {0}key"}


def gather(folder, path: pathlib.Path) -> None:
  """Brings the segments of all ledgers below a folder together.

  Args:
    folder: an epath.Path, such as WORKDIR/ledger.
    path: of the ledger that takes them in.
  """
  segments = Segments(path, folder / 'gathered', shared=True)
  segments.restore()
  segments.close()


class Segments:
  """What stands between a ledger and its folder in a bucket.

  Args:
    path: of the ledger.
    folder: an epath.Path, of this ledger alone.
    shared: whether to restore from the folders beside it, too.
  """

  def __init__(self, path: pathlib.Path, folder, shared: bool = False):
    self.ledger, self.folder, self.shared = Ledger(path), folder, shared
    with self.ledger.transaction() as db:
      noting = db.execute("SELECT 1 FROM sqlite_master WHERE type='trigger' "
                          "AND name='note_calls'").fetchone()
      if not noting:  # rows from before there was a bucket
        self._all_again(db)
      for table, key in _KEYS.items():
        db.execute(_NOTE.format(table=table, key=key.format('NEW.')))

  def _all_again(self, db) -> None:
    """Puts every row into the outbox."""
    db.execute('DELETE FROM outbox')
    for table, key in _KEYS.items():
      db.execute('INSERT INTO outbox (source, key) SELECT ?, '
                 f'{key.format("")} FROM {table}', (table,))

  def ship(self) -> int:
    """Writes what is new; returns how many rows."""
    shipped = 0
    while rows := self.ledger.rows('SELECT * FROM outbox ORDER BY seq LIMIT ?',
                                   ROWS):
      last, lines = rows[-1]['seq'], []
      for row in rows:
        found = self.ledger.rows(
            f'SELECT * FROM {row["source"]} WHERE '
            f'{_KEYS[row["source"]].format("")}=?', row['key'])
        lines += [json.dumps([row['source'], dict(r)]) for r in found]
      name = f'{last:012d}.{self.ledger.owner}.jsonl'
      self.folder.mkdir(parents=True, exist_ok=True)
      files.write_whole(self.folder / name, '\n'.join(lines) + '\n')
      with self.ledger.transaction() as db:
        db.execute('DELETE FROM outbox WHERE seq<=?', (last,))
        db.execute('INSERT INTO segments VALUES (?)',
                   (f'{self.folder.name}/{name}',))
      shipped += len(lines)
    return shipped

  def restore(self) -> int:
    """Takes in segments that this ledger has not seen; returns new rows."""
    self._check_shipped()
    folders = [self.folder]
    if self.shared:
      folders = [p for p in files.listing(self.folder.parent) if p.is_dir()]
    return sum(self._restore(f) for f in folders)

  def _check_shipped(self) -> None:
    """Segments of ours that are not there, in a new bucket or an emptied
    one, are shipped again."""
    noted = {r['name'] for r in self.ledger.rows('SELECT name FROM segments')
             if r['name'].startswith(f'{self.folder.name}/')}
    there = {f'{self.folder.name}/{p.name}' for p in files.listing(self.folder)}
    if noted - there:
      with self.ledger.transaction() as db:
        db.execute('DELETE FROM segments')
        self._all_again(db)

  def _restore(self, folder) -> int:
    seen = {r['name'] for r in self.ledger.rows('SELECT name FROM segments')}
    added = 0
    for path in files.listing(folder):
      name = f'{folder.name}/{path.name}'
      if name in seen or path.suffix != '.jsonl':
        continue
      rows = [json.loads(x) for x in path.read_text().splitlines()]
      with self.ledger.transaction() as db:
        last = db.execute('SELECT COALESCE(MAX(seq), 0) FROM outbox'
                          ).fetchone()[0]
        added += sum(_insert(db, table, row) for table, row in rows)
        # They came from the bucket; they need not go there again.
        db.execute('DELETE FROM outbox WHERE seq>?', (last,))
        db.execute('INSERT INTO segments VALUES (?)', (name,))
    return added

  def close(self) -> None:
    self.ledger.close()


def _insert(db, table: str, row: dict) -> int:
  """Adds a row and its dollars unless it is there; 1 if it was not."""
  if table not in _KEYS:
    raise ValueError(f'a segment with rows of {table!r}')
  if table == 'calls':
    held = db.execute('SELECT created FROM calls WHERE key=?',
                      (row['key'],)).fetchone()
    if held and held[0] != row['created']:  # two machines at the same time
      return _insert(db, 'failed', {
          'created': row['created'], 'core': row['core'],
          'stage': row['stage'], 'reason': PAID_TWICE, 'usd': row['usd']})
  if table == 'failed' and db.execute(
      'SELECT 1 FROM failed WHERE created=? AND stage=? AND reason=?',
      (row['created'], row['stage'], row['reason'])).fetchone():
    return 0
  done = db.execute(
      f'INSERT OR IGNORE INTO {table} ({",".join(row)}) VALUES '
      f'({",".join("?" * len(row))})', tuple(row.values()))
  if done.rowcount and table != 'reused':
    db.execute('UPDATE total SET usd = usd + ?, unknown = unknown + ?',
               (row['usd'] or 0.0, row.get('at_most') or 0.0))
  return done.rowcount
