"""Runs the trials that a config's get_hyper asks for, and compares them.

  python -m launch.sweep --config configs/NAME.py --workdir runs/NAME

Every trial has a directory in the workdir and all share one ledger there: a
core call that two of them make is paid for once. A trial that fails does not
stop the others; the same command goes on where it was stopped and tries
failed ones again. Leaves sweep.json, sweep.csv and sweep.png.

--jobs N           trials at a time
--dry_run          prints the commands and runs nothing
--system NAME      whose accuracy is compared (default: the last of the
                   config's evaluate.systems)
--config.x=y       changes a field in all trials
"""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import json
import pathlib
import re
import shlex
import signal
import sys

from absl import app, flags
from rich.console import Console
from rich.table import Table

from exectune_jax import files
from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import UsageError, UserError
from launch import hyper

ROOT = pathlib.Path(__file__).parents[1]
COLUMNS = ('trial', 'state', 'accuracy', 'low', 'high', 'usd_per_1k',
           'paid_usd', 'saved_usd')

_CONFIG = flags.DEFINE_string('config', None, 'Config file, with arguments '
                              'after a colon.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the trials are kept.')
_JOBS = flags.DEFINE_integer('jobs', 1, 'Trials at a time.', lower_bound=1)
_DRY = flags.DEFINE_bool('dry_run', False, 'Print the commands only.')
_SYSTEM = flags.DEFINE_string('system', '', 'Whose accuracy is compared.')

console = Console(highlight=False, soft_wrap=True)


def trials_of(config: str) -> list[hyper.Trial]:
  """What get_hyper of a config file asks for."""
  path = pathlib.Path(config.partition(':')[0])
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or not path.is_file():
    raise UsageError(f"--config='{config}': there is no such file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_hyper'):
    raise UsageError(f"--config='{config}': has no get_hyper(hyper)")
  try:
    trials = module.get_hyper(hyper)
  except (TypeError, ValueError) as e:
    raise UserError(f"--config='{config}': get_hyper: {e}") from e
  names = [name_of(t) for t in trials]
  if not trials or len(set(names)) < len(names):
    raise UserError(f"--config='{config}': get_hyper gives "
                    f'{"the same trial twice" if trials else "no trials"}')
  return trials


def name_of(trial: hyper.Trial) -> str:
  """Directory of a trial: its fields and values."""
  text = ','.join(f'{field}={value}' for field, value in trial.items())
  return re.sub(r'[^\w.=,+-]', '_', text)


def command(trial: hyper.Trial, config: str, workdir: pathlib.Path,
            more: list[str]) -> list[str]:
  """The command line of one trial."""
  name = name_of(trial)
  return [sys.executable, '-m', 'exectune_jax.main', f'--config={config}',
          f'--workdir={workdir / name}',
          f'--config.ledger={workdir / "ledger.sqlite"}',
          f'--config.run={name}', *more,
          *(f'--config.{field}={value}' for field, value in trial.items())]


async def run_all(trials, config, workdir, more, jobs) -> dict[str, str]:
  """Runs all trials; returns how each ended: 'done' or why it failed."""
  gate, states = asyncio.Semaphore(jobs), {name_of(t): '' for t in trials}
  running: set[asyncio.subprocess.Process] = set()
  stopped = asyncio.Event()
  loop = asyncio.get_running_loop()
  for number in (signal.SIGINT, signal.SIGTERM):
    loop.add_signal_handler(number, stopped.set)

  async def one(trial):
    name = name_of(trial)
    folder = workdir / name
    if (folder / 'done').exists():
      states[name] = 'done'
      return
    async with gate:
      if stopped.is_set():
        states[name] = 'not begun'
        return
      folder.mkdir(parents=True, exist_ok=True)
      with (folder / 'log.txt').open('ab') as log:
        process = await asyncio.create_subprocess_exec(
            *command(trial, config, workdir, more), cwd=ROOT, stdout=log,
            stderr=log, start_new_session=True)
      running.add(process)
      code = await process.wait()
      running.discard(process)
    if code == 0:
      (folder / 'done').touch()
      states[name] = 'done'
    else:
      states[name] = 'stopped' if stopped.is_set() else _last_line(folder)
    ended = sum(bool(s) for s in states.values())
    console.print(f'{ended}/{len(states)} {name}: {states[name]}, '
                  f'${_spent(workdir):.4f} so far')

  async def forward():
    await stopped.wait()
    console.print('stopping: trials save what they have')
    for process in running:
      process.terminate()

  watcher = asyncio.create_task(forward())
  await asyncio.gather(*[one(t) for t in trials])
  watcher.cancel()
  return states


def _last_line(folder) -> str:
  lines = (folder / 'log.txt').read_text(errors='replace').splitlines()
  return f'failed: {lines[-1][:200] if lines else "no output"}'


def _spent(workdir) -> float:
  path = workdir / 'ledger.sqlite'
  if not path.exists():
    return 0.0
  ledger = Ledger(path)
  try:
    return ledger.spent_usd
  finally:
    ledger.close()


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
        'SUM(usd) AS usd FROM calls GROUP BY run')}
    saved = {r['run']: r['usd'] for r in ledger.rows(
        'SELECT run, SUM(usd) AS usd FROM reused GROUP BY run')}
    return paid, saved
  finally:
    ledger.close()


def publish(rows: list[dict], workdir: pathlib.Path) -> None:
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
        f'{row["paid_usd"]:.4f}', f'{row["saved_usd"]:.4f}', row['state'])
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


def main(argv):
  try:
    return _main(argv[1:])
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2 if isinstance(e, UsageError) else 1


def _main(more: list[str]) -> int:
  if not _CONFIG.value or not _WORKDIR.value:
    raise UsageError('--config and --workdir are required')
  strange = [m for m in more if not m.startswith('--config.')]
  if strange:
    raise UsageError(f"'{strange[0]}': only --config.field=value can follow")
  trials = trials_of(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value).expanduser().absolute()
  if _DRY.value:
    for trial in trials:
      console.print(shlex.join(command(trial, _CONFIG.value, workdir, more)))
    return 0
  workdir.mkdir(parents=True, exist_ok=True)
  states = asyncio.run(run_all(trials, _CONFIG.value, workdir, more,
                               _JOBS.value))
  publish(compare(states, workdir, _SYSTEM.value), workdir)
  return 0 if set(states.values()) == {'done'} else 1


def _flags(argv):
  """Our flags; those of the config, --config.x=y, go to every trial."""
  more = [a for a in argv[1:] if a.startswith('--config.')]
  rest = flags.FLAGS([argv[0], *(a for a in argv[1:] if a not in more)])
  return [rest[0], *rest[1:], *more]


if __name__ == '__main__':
  app.run(main, flags_parser=_flags)
