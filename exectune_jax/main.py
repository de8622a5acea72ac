"""Runs the stages of a config.

  python -m exectune_jax.main --config configs/quickstart.py --workdir DIR

Fields can be changed on the command line: --config.rl.steps=100. The same
command continues a run that was interrupted.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from exectune_jax import config as config_lib
from exectune_jax import bucket, files, interrupt, progress
from exectune_jax.cores import estimate
from exectune_jax.errors import Stopped, UsageError, UserError

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, with arguments after a colon.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where results are kept: a directory, or gs://...')
_ESTIMATE_ONLY = flags.DEFINE_bool(
    'estimate_only', False, 'Print what the stages will ask of the cores, and '
    'what that costs; run nothing.')


def main(argv):
  if len(argv) > 1:
    raise UsageError(f'unexpected argument {argv[1]!r}; fields are set with '
                    '--config.name=value')
  config, workdir = CONFIG.value, prepare(CONFIG.value, _WORKDIR.value)
  from exectune_jax.learning import hosts
  interrupt.install(together=hosts.count() > 1)
  try:
    run_stages(config, workdir)
  finally:
    bucket.detach()


def run_stages(config, workdir: pathlib.Path) -> None:
  from exectune_jax.learning import hosts
  for stage in filter(None, (s.strip() for s in config.stages.split(','))):
    name, staged = config_lib.variant(config, stage)
    progress.console.rule(stage)
    if _ESTIMATE_ONLY.value:
      estimate.show(staged, name, workdir)
      continue
    module = importlib.import_module(f'exectune_jax.stages.{name}')
    module.run(staged, workdir)
    hosts.barrier(stage)
    interrupt.check(hosts.agree(interrupt.requested()))


def prepare(config, workdir: str | None) -> pathlib.Path:
  """Checks flags and config, sets up JAX, returns the workdir."""
  if config is None or workdir is None:
    raise UsageError('--config and --workdir are required, as in: python -m '
                     'exectune_jax.main --config configs/quickstart.py '
                     '--workdir runs/quickstart')
  config_lib.validate(config)
  if config.ledger and files.is_url(config.ledger) != files.is_url(workdir):
    raise UserError(f"ledger='{config.ledger}': a run in a bucket shares its "
                    'ledger in a bucket, one in a directory shares a file')
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  try:
    if not files.is_url(workdir):  # an unusable one is known at once
      folder = pathlib.Path(workdir).expanduser()
      folder.mkdir(parents=True, exist_ok=True)
    import jax  # after the checks: it takes a second

    from exectune_jax.learning import hosts
    hosts.join(config.mesh.hosts)
    if files.is_url(workdir):
      folder = bucket.attach(workdir, hosts.index(), config.ledger,
                             config.run)
    if hosts.first():
      config_lib.remember(config, folder)
    progress.console.quiet = not hosts.first()
  except OSError as e:
    raise UserError(f"--workdir='{workdir}': {e.strerror}; choose a directory "
                    'that can be written') from e
  if config.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser(
        config.compilation_cache))
    # Small programs too: a second start compiles nothing.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # Every transfer between host and device is explicit, or an error.
  jax.config.update('jax_transfer_guard', 'disallow')
  return folder


def run(work=main):
  """Entry point: known failures end in one line and an exit code.

  work: from the arguments that are no flags to an exit code, or None.
  """
  try:
    argv = flags.FLAGS(sys.argv)
    list(CONFIG.value or ())  # a file that can't be loaded raises here
  except flags.Error as e:
    _fail(str(e).splitlines()[0], 2)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    # ml_collections reports an unknown field or a wrong type like this
    _fail(f'--config: {" ".join(str(e).split())[:300]}', 2)
  except (UserError, OSError, SyntaxError, ImportError) as e:
    _fail(f'--config: {" ".join(str(e).split())}', 2)
  try:
    sys.exit(work(argv))
  except UserError as e:
    _fail(str(e), 2 if isinstance(e, UsageError) else 1)
  except (Stopped, KeyboardInterrupt) as e:
    _fail(f'stopped by {e}; everything so far is saved, the same command '
          'continues' if isinstance(e, Stopped) else 'interrupted at once; the '
          'same command continues from the last checkpoint', 1)
  except Exception:
    if _alone():
      raise
    traceback.print_exc()
    _fail('the other processes cannot go on without this one', 1)


def _fail(message: str, code: int):
  print(f'error: {message}', file=sys.stderr, flush=True)
  if not _alone():
    os._exit(code)  # an orderly exit would wait for the other processes
  sys.exit(code)


def _alone() -> bool:
  return 'jax' not in sys.modules or sys.modules['jax'].process_count() == 1


if __name__ == '__main__':
  run()
