"""What came out of a sweep: a table, sweep.json, sweep.csv, sweep.png."""

from __future__ import annotations

import csv
import json
import pathlib

from rich.markup import escape
from rich.table import Table

from exectune_jax import files
from exectune_jax.cores.ledger import Ledger

COLUMNS = ('trial', 'state', 'accuracy', 'low', 'high', 'usd_per_1k',
           'paid_usd', 'saved_usd')


def compare(states: dict[str, str], workdir: pathlib.Path,
            system: str) -> list[dict]:
  """A row a trial: accuracy with its 95% interval, dollars."""
  paid, saved = _money(workdir)
  rows = []
  for name, state in states.items():
    row = dict.fromkeys(COLUMNS) | {
        'trial': name, 'state': state, 'paid_usd': paid.get(name, 0.0),
        'saved_usd': saved.get(name, 0.0)}
    path = workdir / name / 'report.json'
    if path.exists():
      systems = {s['name']: s for s in json.loads(path.read_text())['systems']}
      found = systems.get(system) or list(systems.values())[-1]
      row |= {'accuracy': found['accuracy'], 'low': found['ci95'][0],
              'high': found['ci95'][1], 'usd_per_1k': found['usd_per_1k']}
    rows.append(row)
  return rows


def _money(workdir) -> tuple[dict, dict]:
  """Dollars by trial: what it paid, and what others had paid for it."""
  if not (workdir / 'ledger.sqlite').exists():
    return {}, {}
  ledger = Ledger(workdir / 'ledger.sqlite')
  try:
    paid = {r['run']: r['usd'] for r in ledger.rows(
        "SELECT substr(stage, 1, instr(stage, '/') - 1) AS run, "
        'SUM(usd) AS usd FROM (SELECT stage, usd FROM calls UNION ALL '
        'SELECT stage, usd FROM failed) GROUP BY run')}
    saved = {r['run']: r['usd'] for r in ledger.rows(
        'SELECT run, SUM(usd) AS usd FROM reused GROUP BY run')}
    return paid, saved
  finally:
    ledger.close()


def publish(rows: list[dict], workdir: pathlib.Path, console) -> None:
  """Writes sweep.json, sweep.csv, sweep.png; prints the table."""
  files.write_whole(workdir / 'sweep.json', json.dumps(rows, indent=2) + '\n')
  with (workdir / 'sweep.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
  table = Table(title=f'{len(rows)} trials', title_justify='left')
  for column in ('trial', 'accuracy % (95%)', '$ per 1,000', 'paid $',
                 'saved $', 'state'):
    table.add_column(column, overflow='fold')
  for row in rows:
    known = row['accuracy'] is not None
    table.add_row(
        row['trial'], f'{100 * row["accuracy"]:.1f} ({100 * row["low"]:.1f}-'
        f'{100 * row["high"]:.1f})' if known else '-',
        f'{row["usd_per_1k"]:.4g}' if known else '-',
        f'{row["paid_usd"]:.4f}', f'{row["saved_usd"]:.4f}',
        escape(row['state']))
  console.print(table)
  paid, saved = (sum(r[k] for r in rows) for k in ('paid_usd', 'saved_usd'))
  console.print(f'paid ${paid:.4f}; calls that another trial had made saved '
                f'${saved:.4f}')
  _plot([r for r in rows if r['accuracy'] is not None], workdir / 'sweep.png')


def _plot(rows, path) -> None:
  if not rows:
    return
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(figsize=(7, 1 + 0.4 * len(rows)))
  values = [100 * r['accuracy'] for r in rows]
  errors = [[v - 100 * r['low'] for v, r in zip(values, rows, strict=True)],
            [100 * r['high'] - v for v, r in zip(values, rows, strict=True)]]
  axes.errorbar(values, range(len(rows)), xerr=errors, fmt='o', capsize=3)
  axes.set_yticks(range(len(rows)), [
      f'{r["trial"]}\n${r["usd_per_1k"]:.3g} per 1,000' for r in rows])
  axes.invert_yaxis()
  axes.set_xlabel('accuracy % (95% interval)')
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)
