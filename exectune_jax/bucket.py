"""A bucket as workdir: gs://NAME/DIR, or file:///DIR on a disk that stays.

A run writes to a directory of its machine, as always. What changes there is
shipped to the bucket within seconds: files whole, core calls as small
segments of the ledger (cores/segments.py). Checkpoints are written to the
bucket directly, after everything they build on. A fresh machine begins with
what the bucket holds, so that a lost one costs seconds of calls and the steps
since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import sys
import threading
import time

import fsspec
from etils import epath

from exectune_jax import files
from exectune_jax.cores.segments import Segments
from exectune_jax.errors import UserError

SHIP_S = 2.0  # between two looks at what has changed
LARGE = 64 << 20  # bytes; files that grow beyond are shipped when they rest
_SHIPPED = '.shipped'  # here: the bucket has had something of this run
_NOT_SHIPPED = re.compile(r'\.sqlite(-\w+)?$|\.partial$|^\.shipped$')

# gcsfs would keep listings, and never see what other hosts write.
for _scheme in ('gs', 'gcs'):
  fsspec.config.conf.setdefault(_scheme, {})['use_listings_cache'] = False

_mirror: _Mirror | None = None


def attach(url: str, host: int, ledger: str = '',
           run: str = '') -> pathlib.Path:
  """Begins shipping; returns the local directory, with what the bucket has.

  Args:
    url: of the workdir.
    host: number of this process; each has a directory and a ledger.
    ledger: where several runs bring their calls together; '': in the workdir.
    run: this run's name among them.

  Raises:
    UserError: the bucket cannot be reached.
  """
  global _mirror
  base = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
  name = re.sub(r'\W+', '-', url)[-40:].strip('-')
  digest = hashlib.sha256(url.encode()).hexdigest()[:8]
  local = (base / 'exectune_jax/workdirs' / f'{name}-{digest}'
           / f'host{host}').resolve()
  try:
    _set_aside(local, path_of(url))
    local.mkdir(parents=True, exist_ok=True)
    segments = Segments(
        local / ('ledger.sqlite' if not host else f'ledger.{host}.sqlite'),
        (path_of(ledger) if ledger else path_of(url) / 'ledger')
        / (f'{run}.host{host}' if run else f'host{host}'), bool(ledger))
    mirror = _Mirror(path_of(url), local, segments)
    mirror.fetch()
  except UserError:
    raise
  except Exception as e:  # noqa: BLE001 each storage has errors of its own
    raise UserError(f"--workdir='{url}': {type(e).__name__}: {str(e)[:200]}; "
                    'is the bucket there, may you write to it, and is '
                    "the extra '.[gcs]' installed?") from e
  mirror.start()
  _mirror = mirror
  return local


def place(folder: pathlib.Path):
  """Where the checkpoints of a folder of the workdir are."""
  folder = folder.resolve()
  return folder if _mirror is None else _mirror.remote.joinpath(
      *folder.relative_to(_mirror.local).parts)


def flush() -> None:
  """Returns once everything written so far is in the bucket.

  Raises:
    UserError: it cannot be written.
  """
  if _mirror is not None:
    _mirror.flush()


def refresh() -> None:
  """Fetches what other processes have written.

  Raises:
    UserError: it cannot be read.
  """
  if _mirror is not None:
    with _mirror.trouble('read'):
      _mirror.fetch()


def detach() -> None:
  """Ships the rest and stops."""
  global _mirror
  mirror, _mirror = _mirror, None
  if mirror is not None:
    mirror.stop()


class _Mirror:
  """One local directory and its bucket."""

  def __init__(self, remote: epath.Path, local: pathlib.Path,
               segments: Segments):
    self.remote, self.local, self.segments = remote, local, segments
    self._known: dict[str, tuple[int, int]] = {}  # mtime and size, by path
    self._lock = threading.Lock()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._loop, name='bucket',
                                    daemon=True)
    self._trouble = ''

  def start(self) -> None:
    self._thread.start()

  def fetch(self) -> None:
    """What the bucket holds replaces what is here."""
    with self._lock:
      self.remote.mkdir(parents=True, exist_ok=True)
      self._fetch(self.remote, self.local)
      self.segments.restore()

  def _fetch(self, remote, local) -> None:
    local.mkdir(exist_ok=True)
    for item in files.listing(remote):
      if item.is_dir():
        checkpoint = item.name.split('.')[0].isdigit()
        if not checkpoint and item != self.remote / 'ledger':
          self._fetch(item, local / item.name)
      elif not _NOT_SHIPPED.search(item.name):
        self._fetch_file(item, local / item.name)

  def _fetch_file(self, item, path) -> None:
    """Files on both sides have one time of change, so that equal ones are
    known by it."""
    there = item.stat()
    if not path.exists() or _version(path) != _remote_version(there):
      files.write_whole(path, item.read_bytes())
      os.utime(path, ns=(_remote_version(there)[0],) * 2)
    self._known[self._name(path)] = _version(path)

  def ship(self, everything: bool = False) -> None:
    """Uploads core calls, then files that have changed."""
    with self._lock:
      self.segments.ship()
      for path in sorted(self.local.rglob('*')):
        if not path.is_file() or _NOT_SHIPPED.search(path.name):
          continue
        name, version = self._name(path), _version(path)
        growing = (version[1] > LARGE
                   and time.time_ns() - version[0] < 2e9 * SHIP_S)
        if self._known.get(name) == version or (growing and not everything):
          continue
        target = self.remote / name
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(target, path.read_bytes())
        if _version(path) == version:
          # What is appended in this very moment still changes the size.
          version = _remote_version(target.stat())[0], version[1]
          os.utime(path, ns=(version[0],) * 2)
        self._known[name] = version
      (self.local / _SHIPPED).touch()

  def flush(self) -> None:
    with self.trouble('written'):
      self.ship(everything=True)

  @contextlib.contextmanager
  def trouble(self, what: str):
    try:
      yield
    except UserError:
      raise
    except Exception as e:  # noqa: BLE001 each storage has errors of its own
      raise UserError(f'{self.remote}: cannot be {what}: '
                      f'{type(e).__name__}: {str(e)[:200]}; what it lacks is '
                      f'in {self.local}; mend the bucket and run the same '
                      'command again') from e

  def stop(self) -> None:
    self._ended.set()
    self._thread.join()
    try:
      self.flush()
    finally:
      self.segments.close()

  def _loop(self) -> None:
    while not self._ended.wait(SHIP_S):
      try:
        self.ship()
        self._trouble = ''
      except Exception as e:  # noqa: BLE001 tried again; flush insists
        if not self._trouble:
          print(f'warning: {self.remote}: {type(e).__name__}: '
                f'{str(e)[:200]}; trying again', file=sys.stderr, flush=True)
        self._trouble = str(e)

  def _name(self, path: pathlib.Path) -> str:
    return path.relative_to(self.local).as_posix()


def _set_aside(local: pathlib.Path, remote: epath.Path) -> None:
  """Whoever emptied the bucket wants to begin anew."""
  if (local / _SHIPPED).exists() and not files.listing(remote):
    aside = local.with_name(f'{local.name}.{int(time.time())}')
    local.rename(aside)
    print(f'{remote} is empty: beginning anew; the run that was there is in '
          f'{aside}', file=sys.stderr, flush=True)


def path_of(url: str) -> epath.Path:
  """A bucket's folder, or the directory that stands for one."""
  return epath.Path(url.removeprefix('file://'))


def _version(path: pathlib.Path) -> tuple[int, int]:
  """Nanosecond of the last change, bytes."""
  stat = path.stat()
  return stat.st_mtime_ns, stat.st_size


def _remote_version(stat) -> tuple[int, int]:
  return int(stat.mtime * 1e9), stat.length
