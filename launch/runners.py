"""Where the trials of a sweep run: here, on Cloud TPU VMs, or by SkyPilot.

A runner turns a trial into commands. Remote ones need a bucket, in which each
trial has its workdir and all share the ledger.
"""

from __future__ import annotations

import os
import pathlib
import sys

from exectune_jax import files
from exectune_jax.errors import UsageError, UserError

KEYS = ('GEMINI_API_KEY', 'OPENAI_API_KEY', 'ANTHROPIC_API_KEY',
        'EXECTUNE_CORE_API_KEY', 'HF_TOKEN')
Command = list[str]


class Local:
  """Child processes of this one.

  Args:
    workdir: of the sweep.
    bucket, machine: of the remote runners.
  """

  def __init__(self, workdir: pathlib.Path, bucket: str = '',
               machine: tuple[str, ...] = ()):
    self.workdir, self.bucket, self.machine = workdir, bucket, machine

  def prepare(self, slot: int) -> list[Command]:
    """Once before the first trial on one of --jobs places."""
    return []

  def trial(self, slot: int, name: str, flags: list[str]) -> list[Command]:
    """To the end of one trial. flags: of main, without the workdir."""
    return [[sys.executable, '-m', 'exectune_jax.main', flags[0],
             f'--workdir={self.workdir / name}',
             f'--config.ledger={self.workdir / "ledger.sqlite"}', *flags[1:]]]

  def finish(self, slot: int) -> list[Command]:
    """Once after the last trial."""
    return []

  def left(self) -> str:
    """What goes on when the sweep is stopped."""
    return ''


class _Remote(Local):

  def __init__(self, workdir, bucket='', machine=()):
    super().__init__(workdir, bucket.rstrip('/'), machine)
    if not files.is_url(bucket):
      raise UsageError(f"--bucket='{bucket}': this runner needs one, as "
                       'gs://NAME/DIR')


class TpuVm(_Remote):
  """One TPU VM a place, by launch/tpu_vm.sh; deleted at the end."""

  script = 'launch/tpu_vm.sh'

  def name(self, slot: int) -> str:
    return f'sweep-{_label(self.workdir.name)}-{slot}'

  def prepare(self, slot):
    return [[self.script, 'create', self.name(slot), *self.machine],
            [self.script, 'setup', self.name(slot)]]

  def trial(self, slot, name, flags):
    return [[self.script, 'run', self.name(slot), '--', flags[0],
             f'--workdir={self.bucket}/{name}',
             f'--config.ledger={self.bucket}/ledger', *flags[1:]]]

  def finish(self, slot):
    return [[self.script, 'delete', self.name(slot)]]

  def left(self):
    return (f'the machines {self.name(0)}, ... go on and cost: the same '
            f'command takes them up, {self.script} delete NAME ends them')


class Sky(_Remote):
  """Managed jobs of SkyPilot, which looks for machines by itself."""

  def trial(self, slot, name, flags):
    config, *rest = flags
    if any(' ' in f for f in rest):
      raise UserError('--runner=sky: values with spaces cannot be passed on; '
                      'set them in the config')
    rest.append(f'--config.ledger={self.bucket}/ledger')
    return [['sky', 'jobs', 'launch', '-y', '-n', _label(name)[:40].strip('-'),
             'launch/sky.yaml', *self.machine,
             '--env', f'CONFIG={config.removeprefix("--config=")}',
             '--env', f'WORKDIR={self.bucket}/{name}',
             '--env', f'ARGS={" ".join(rest)}',
             *(part for key in KEYS if os.environ.get(key)
               for part in ('--secret', key))]]

  def left(self):
    return ('the jobs go on: sky jobs queue shows them; cancel them before the '
            'same command, or two will write to one workdir')


def _label(text: str) -> str:
  """What clouds take as a name."""
  return ''.join(c if c.isalnum() else '-' for c in text.lower())


RUNNERS = {'local': Local, 'tpu_vm': TpuVm, 'sky': Sky}
