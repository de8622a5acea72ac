"""What the ledgers of a run say: its last calls, its bill, all of it.

  python -m exectune_jax.cores.ledger show DIR [--last 20]
  python -m exectune_jax.cores.ledger spend DIR [--by stage,core,day]
  python -m exectune_jax.cores.ledger export DIR [--format jsonl|csv]

DIR is a workdir, or a copy of one that was in a bucket; every process of a
multi-host run has its own ledger in it.
`spend` prints a table, or with --format the same as JSON lines or CSV.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import pathlib
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exectune_jax import files
from exectune_jax.cores import segments
from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import UserError

COLUMNS = {'stage': 'stage', 'core': 'core',
           'day': "strftime('%Y-%m-%d', created, 'unixepoch')"}


def open_all(folder: str) -> list[Ledger]:
  """The ledgers of a workdir; what a bucket had is put into one."""
  place = pathlib.Path(folder).expanduser()
  if (place / 'ledger').is_dir():
    segments.gather(place / 'ledger', place / 'ledger.sqlite')
  paths = sorted(place.glob('ledger*.sqlite'))
  if not paths:
    raise UserError(f"'{folder}': there is no ledger; name the workdir of a "
                    'run' + (', as a directory: copy it from its bucket'
                             if files.is_url(folder) else ''))
  return [Ledger(path) for path in paths]


def spend(ledgers, by=('stage', 'core', 'day')) -> list[dict]:
  """One row a group: calls, tokens, dollars; then what failed.

  usd: of the answers. failed: tries without an answer. failed_usd: what they
  cost all the same. unknown: of these, tries whose cost nobody told us.
  estimated: calls whose tokens we guessed.
  """
  keys = ', '.join(f'{COLUMNS[b]} AS {b}' for b in by)
  names = ', '.join(by)
  sums = {}
  for ledger in ledgers:
    rows = ledger.rows(f"""
        SELECT {names}, SUM(n) AS calls, SUM(i) AS input_tokens,
          SUM(c) AS cached_tokens, SUM(o) AS output_tokens, SUM(u) AS usd,
          SUM(e) AS estimated, SUM(f) AS failed, SUM(fu) AS failed_usd,
          SUM(x) AS unknown
        FROM (SELECT {keys}, 1 AS n, input_tokens AS i, cached_tokens AS c,
                output_tokens AS o, usd AS u, estimated AS e, 0 AS f,
                0.0 AS fu, 0 AS x FROM calls
              UNION ALL
              SELECT {keys}, 0, 0, 0, 0, 0.0, 0, 1, COALESCE(usd, 0.0),
                usd IS NULL FROM failed)
        GROUP BY {names} ORDER BY {names}""")
    for row in map(dict, rows):
      held = sums.setdefault(tuple(row[b] for b in by), row)
      if held is not row:
        held.update({k: held[k] + row[k] for k in row if k not in by})
  return [sums[key] for key in sorted(sums)]


def calls(ledgers):
  """Every call as a dict, ledger by ledger in order of time."""
  for ledger in ledgers:  # by key: the texts of all may not fit in memory
    for key in [r['key'] for r in ledger.rows(
        'SELECT key FROM calls ORDER BY created')]:
      row = dict(ledger.rows('SELECT * FROM calls WHERE key=?', key)[0])
      yield {**row, 'request': json.loads(row['request']),
             'estimated': bool(row['estimated'])}


def _show(ledgers, args, console):
  last = sorted((r for ledger in ledgers for r in ledger.rows(
      'SELECT * FROM calls ORDER BY created DESC LIMIT ?', args.last)),
      key=lambda r: r['created'])[-args.last:]
  table = Table('when (UTC)', 'stage', 'core', 'in', 'out', 'usd', 's',
                'finish', 'reply')
  for r in last:
    when = datetime.datetime.fromtimestamp(r['created'], datetime.UTC)
    table.add_row(f'{when:%m-%d %H:%M:%S}', r['stage'], r['core'],
                  str(r['input_tokens']), str(r['output_tokens']),
                  f'{r["usd"]:.6f}', f'{r["latency_s"]:.1f}', r['finish'],
                  escape(' '.join(r['text'].split())[:50]))
  console.print(table)
  reasons = [r for ledger in ledgers for r in ledger.rows(
      'SELECT reason, COUNT(*) AS n FROM failed GROUP BY reason '
      'ORDER BY n DESC LIMIT 10')]
  for r in reasons:
    console.print(f'{r["n"]} tries failed: {r["reason"]}', markup=False)


def _spend(ledgers, args, console):
  by = tuple(args.by.split(','))
  if unknown := set(by) - set(COLUMNS):
    raise UserError(f'--by={args.by}: {sorted(unknown)[0]} is unknown; choose '
                    f'from {", ".join(COLUMNS)}')
  rows = spend(ledgers, by)
  if args.format:
    _write(rows, args.format, sys.stdout)
    return
  table = Table(*by)
  for column in ('calls', 'tokens in', 'cached', 'out', 'usd', 'failed',
                 'failed usd', 'cost unknown'):
    table.add_column(column, justify='right')
  for r in rows:
    table.add_row(*(r[b] for b in by), str(r['calls']),
                  str(r['input_tokens']), str(r['cached_tokens']),
                  str(r['output_tokens']), f'{r["usd"]:.4f}',
                  str(r['failed']), f'{r["failed_usd"]:.4f}',
                  str(r['unknown']))
  console.print(table)
  guessed = sum(r['estimated'] for r in rows)
  note = f'; {guessed} calls without a usage were estimated' if guessed else ''
  doubt = sum(x.in_doubt_usd for x in ledgers)
  if doubt:
    note += (f'; what tries of unknown cost can have cost at most, '
             f'${doubt:.4f}, counts against budget_usd')
  console.print(f'total ${sum(x.spent_usd for x in ledgers):.4f}{note}')


def _export(ledgers, args, console):
  form = args.format or 'jsonl'
  path = pathlib.Path(args.dir).expanduser() / f'ledger.{form}'
  with path.open('w', newline='', encoding='utf-8') as file:
    count = _write(calls(ledgers), form, file)
  console.print(f'{count} calls written to {path}')


def _write(rows, form: str, file) -> int:
  count, writer = 0, None
  for row in rows:
    count += 1
    if form == 'jsonl':
      file.write(json.dumps(row, ensure_ascii=False) + '\n')
      continue
    if writer is None:
      writer = csv.DictWriter(file, row)
      writer.writeheader()
    writer.writerow({k: json.dumps(v, ensure_ascii=False)
                     if isinstance(v, list) else v for k, v in row.items()})
  return count


def run(argv=None) -> None:
  """The command line; errors end in one line and exit code 1."""
  parser = argparse.ArgumentParser(
      prog='python -m exectune_jax.cores.ledger', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('what', choices=('show', 'spend', 'export'))
  parser.add_argument('dir')
  parser.add_argument('--by', default='stage,core,day')
  parser.add_argument('--format', choices=('jsonl', 'csv'))
  parser.add_argument('--last', type=int, default=20)
  args = parser.parse_args(argv)
  try:
    ledgers = open_all(args.dir)
    {'show': _show, 'spend': _spend, 'export': _export}[args.what](
        ledgers, args, Console(width=None if sys.stdout.isatty() else 160))
    for ledger in ledgers:
      ledger.close()
  except (UserError, OSError) as e:
    sys.exit(f'error: {e}')
