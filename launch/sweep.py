"""Runs the trials that a config's get_hyper asks for, and compares them.

  python -m launch.sweep --config configs/NAME.py --workdir runs/NAME

Every trial has a directory in the workdir and all share one ledger there: a
core call that two of them make is paid for once. A trial that fails does not
stop the others; the same command goes on where it was stopped and tries
failed ones again. Leaves sweep.json, sweep.csv and sweep.png.

--jobs N           trials at a time
--runner NAME      local, tpu_vm (a TPU VM a job) or sky (SkyPilot jobs)
--bucket URL       where trials that run elsewhere keep their workdirs
--machine FLAGS    for tpu_vm.sh create, or sky jobs launch
--dry_run          prints the commands and runs nothing
--system NAME      whose accuracy is compared (default: the last of the
                   config's evaluate.systems)
--config.x=y       changes a field in all trials
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import pathlib
import re
import shlex
import signal
import sys

from absl import app, flags
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from exectune_jax import files
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores import segments
from exectune_jax.errors import UsageError, UserError
from launch import comparison, hyper, runners

ROOT = pathlib.Path(__file__).parents[1]

_CONFIG = flags.DEFINE_string('config', None, 'Config file, with arguments '
                              'after a colon.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the trials are kept.')
_RUNNER = flags.DEFINE_enum('runner', 'local', list(runners.RUNNERS),
                            'Where the trials run.')
_BUCKET = flags.DEFINE_string('bucket', '', 'Workdirs of remote trials.')
_MACHINE = flags.DEFINE_string('machine', '', 'Further flags for machines.')
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


def flags_of(trial: hyper.Trial, config: str, more: list[str]) -> list[str]:
  """What main is told about one trial; the config comes first."""
  return [f'--config={config}', f'--config.run={name_of(trial)}', *more,
          *(f'--config.{field}={value}' for field, value in trial.items())]


class Sweep:
  """Runs trials, so many at a time, and knows how each is doing.

  Args:
    trials: from get_hyper.
    flags: of main, by the trial's name.
    runner: says which commands a trial is.
    jobs: trials at a time.
  """

  def __init__(self, trials, flags, runner, jobs: int):
    self.flags, self.runner, self.jobs = flags, runner, jobs
    self.workdir = runner.workdir
    self.states = {name_of(t): '' for t in trials}
    self._running: set[asyncio.subprocess.Process] = set()
    self._stopped = asyncio.Event()

  async def run(self) -> dict[str, str]:
    """How each trial ended: 'done' or why it did not."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
      loop.add_signal_handler(number, self._stop)
    waiting = []
    for name in self.states:
      if (self.workdir / name / 'done').exists():
        self.states[name] = 'done'
      else:
        waiting.append(name)
    with self._shown():
      await asyncio.gather(*[self._place(slot, waiting) for slot in range(
          min(self.jobs, len(waiting)))])
    if self._stopped.is_set() and self.runner.left():
      console.print(self.runner.left())
    return {name: state or 'not begun' for name, state in self.states.items()}

  async def _place(self, slot: int, waiting: list[str]) -> None:
    """One of the places: takes trial after trial."""
    log = self.workdir / f'machine{slot}.txt'
    if await self._all(self.runner.prepare(slot), log):
      console.print(f'place {slot}: {_last_line(log)}')
      waiting = []  # and give back what there is of it
    while waiting and not self._stopped.is_set():
      name = waiting.pop(0)
      self.states[name] = 'running'
      folder = self.workdir / name
      folder.mkdir(parents=True, exist_ok=True)
      code = await self._all(self.runner.trial(slot, name, self.flags[name]),
                             folder / 'log.txt')
      if code == 0:
        (folder / 'done').touch()
      self.states[name] = 'done' if code == 0 else (
          'stopped' if self._stopped.is_set() else
          f'failed: {_last_line(folder / "log.txt")}')
      ended = sum(s not in ('', 'running') for s in self.states.values())
      console.print(f'{ended}/{len(self.states)} {name}: {self.states[name]}, '
                    f'${_spent(self.workdir):.4f} so far')
    if not self._stopped.is_set():
      await self._all(self.runner.finish(slot), log)

  async def _all(self, commands, log: pathlib.Path) -> int:
    """Exit code of the first that fails, or 0."""
    for command in commands:
      with log.open('ab') as file:
        try:
          process = await asyncio.create_subprocess_exec(
              *command, cwd=ROOT, stdout=file, stderr=file,
              start_new_session=True)
        except OSError as e:
          file.write(f'error: {command[0]}: {e.strerror}\n'.encode())
          return 127
      self._running.add(process)
      code = await process.wait()
      self._running.discard(process)
      if code:
        return code
    return 0

  def _stop(self) -> None:
    self._stopped.set()
    console.print('stopping: trials save what they have')
    for process in self._running:
      process.terminate()

  @contextlib.contextmanager
  def _shown(self):
    """On a terminal, a table that lives while the trials run."""
    if not console.is_terminal:
      yield
      return
    with Live(get_renderable=self._table, console=console,
              refresh_per_second=1):
      yield

  def _table(self) -> Table:
    table = Table(title=f'{len(self.states)} trials, '
                  f'${_spent(self.workdir):.4f} so far', title_justify='left',
                  expand=True)
    table.add_column('trial', overflow='fold', ratio=2)
    table.add_column('state', no_wrap=True, min_width=8, max_width=30)
    table.add_column('says', no_wrap=True, ratio=3)
    for name, state in self.states.items():
      log = self.workdir / name / 'log.txt'
      says = _last_line(log) if state == 'running' and log.exists() else ''
      table.add_row(escape(name), escape(state or 'waits'), escape(says))
    return table


def _last_line(log: pathlib.Path) -> str:
  with log.open('rb') as file:
    file.seek(max(0, log.stat().st_size - 4096))
    lines = file.read().decode(errors='replace').split('\n')
  return next((x[:200] for x in reversed(lines) if x.strip()), 'no output')


def collect(names, url: str, workdir: pathlib.Path) -> None:
  """Reports and calls of trials that ran elsewhere."""
  from exectune_jax import bucket
  remote = bucket.path_of(url)
  for name in names:
    report = remote / name / 'report.json'
    if report.exists():
      files.write_whole(workdir / name / 'report.json', report.read_text())
  segments.gather(remote / 'ledger', workdir / 'ledger.sqlite')


def _spent(workdir) -> float:
  path = workdir / 'ledger.sqlite'
  if not path.exists():
    return 0.0
  ledger = Ledger(path)
  try:
    return ledger.spent_usd
  finally:
    ledger.close()


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
  runner = runners.RUNNERS[_RUNNER.value](
      workdir, _BUCKET.value, tuple(shlex.split(_MACHINE.value)))
  flags_by_name = {name_of(t): flags_of(t, _CONFIG.value, more)
                   for t in trials}
  if _DRY.value:
    for command in _commands(runner, flags_by_name):
      console.print(shlex.join(command))
    return 0
  workdir.mkdir(parents=True, exist_ok=True)

  async def run():
    return await Sweep(trials, flags_by_name, runner, _JOBS.value).run()
  states = asyncio.run(run())
  if _BUCKET.value:
    collect(states, _BUCKET.value, workdir)
  comparison.publish(
      comparison.compare(states, workdir, _SYSTEM.value), workdir, console)
  return 0 if set(states.values()) == {'done'} else 1


def _commands(runner, flags_by_name) -> list[list[str]]:
  """All of them, as if the places took turns."""
  slots = range(min(_JOBS.value, len(flags_by_name)))
  found = [c for slot in slots for c in runner.prepare(slot)]
  for i, (name, flags_) in enumerate(flags_by_name.items()):
    found += runner.trial(i % len(slots), name, flags_)
  return found + [c for slot in slots for c in runner.finish(slot)]


def _flags(argv):
  """Our flags; those of the config, --config.x=y, go to every trial."""
  more = [a for a in argv[1:] if a.startswith('--config.')]
  rest = flags.FLAGS([argv[0], *(a for a in argv[1:] if a not in more)])
  return [rest[0], *rest[1:], *more]


if __name__ == '__main__':
  app.run(main, flags_parser=_flags)
