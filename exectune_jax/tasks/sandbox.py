"""Runs programs that a model wrote, away from everything else.

A program and its tests run in two sandboxes (bubblewrap): no network, no
files but the interpreter's, an empty environment, a small tmpfs, limits on
memory, processes and time. What they run is in inside/; this side starts
them, carries their messages and watches the clock.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

from exectune_jax.errors import Lost, UserError
from exectune_jax.tasks.inside.remote import MAX_LINE

INSIDE = pathlib.Path(__file__).parent / 'inside'
START_S = 20.0  # for an interpreter to say that it is ready
TMP_BYTES = 64 << 20
ENVIRONMENT = {'PATH': '/usr/bin:/bin', 'HOME': '/tmp', 'LANG': 'C.UTF-8',
               'OPENBLAS_NUM_THREADS': '1'}
# What the tests are told when the program is gone; no 'except Exception'
# takes it for an error that the program was right to raise.
ENDED = ['raise', ['ProgramEnded', 'BaseException'],
         ['list', ['the program ended']]]


class Sandbox:
  """Judges programs one at a time. The next interpreter is kept warm.

  Args:
    timeout_s: wall clock of one program and its tests.
    memory_mb: address space of each process.
    unsafe: run them as plain subprocesses instead.
  """

  def __init__(self, timeout_s: float, memory_mb: int, unsafe: bool = False):
    self._timeout_s = timeout_s
    self._limits = str(memory_mb << 20), str(int(timeout_s) + 2)
    self._unsafe = unsafe
    self._tests: _Process | None = None
    self._next: _Process | None = None

  def judge(self, setup: str, code: str, tests: str,
            entry_point: str = '') -> str:
    """'passed', 'failed: ...', 'timeout', 'memory' or 'import error: ...'.

    Args:
      setup: what program and tests both begin with.
      code: the program, executed after `setup` in the same namespace.
      tests: raise unless the program is right; functions named test* too.
      entry_point: must be defined by the program; '' if no single name must.

    Raises:
      Lost: the sandbox itself does not work, or the tests do not.
    """
    job = {'setup': setup, 'code': code, 'tests': tests,
           'entry_point': entry_point}
    with contextlib.ExitStack() as held:
      tests, self._tests = self._tests or self._start('tests'), None
      kept = held.enter_context(contextlib.ExitStack())
      kept.callback(tests.kill)
      program, self._next = self._next or self._start('program'), None
      held.callback(program.kill)
      tests.ready()
      program.ready()
      self._next = self._start('program')  # starts while this one runs
      try:
        verdict = self._carry(job, tests, program)
        self._tests = tests  # not in the middle of a conversation
        kept.pop_all()
      except TimeoutError:
        verdict = 'timeout'
      except EOFError as e:  # what a program ends is told to the tests
        raise Lost('sandbox: the interpreter of the tests ended') from e
    if verdict.startswith('broken tests'):
      raise Lost(verdict)
    return verdict

  def close(self) -> None:
    for process in filter(None, (self._tests, self._next)):
      process.kill()
    self._tests = self._next = None

  def _start(self, role) -> _Process:
    try:
      return _Process(role, self._limits, self._unsafe)
    except OSError as e:
      raise Lost(f'sandbox did not start: {e}') from e

  def _carry(self, job, tests, program) -> str:
    """Passes messages to and fro until the tests reach a verdict."""
    deadline = time.monotonic() + self._timeout_s
    tests.send(json.dumps(job).encode() + b'\n', deadline)
    while True:
      line = tests.receive(deadline)
      if line.startswith(b'["verdict"'):
        return json.loads(line)[1]
      try:
        program.send(line, deadline)
        line = program.receive(deadline)
      except EOFError:
        line = json.dumps(ENDED).encode() + b'\n'
      tests.send(line, deadline)


class _Process:
  """An interpreter in a sandbox of its own."""

  def __init__(self, role, limits, unsafe):
    packages = sysconfig.get_path('purelib')
    self._folder = tempfile.mkdtemp() if unsafe else None
    python = os.path.realpath(sys.executable)
    command = [python, '-I', '-S', '-B']
    command += [str(INSIDE / 'worker.py') if unsafe else '/inside/worker.py']
    command += [role, packages, *limits]
    self._errors = tempfile.TemporaryFile()
    self._process = subprocess.Popen(
        command if unsafe else [*_isolation(packages), *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        cwd=self._folder, start_new_session=True,
        env=ENVIRONMENT)  # bwrap's too: programs can read it in /proc
    self._in, self._out = (f.fileno() for f in (self._process.stdin,
                                                self._process.stdout))
    os.set_blocking(self._in, False)
    self._read = bytearray()
    self._ready = False

  def ready(self):
    """Waits for the interpreter. Raises Lost if it does not come up."""
    if self._ready:
      return
    try:
      self.receive(time.monotonic() + START_S)
    except (EOFError, TimeoutError) as e:
      self.kill()
      self._errors.seek(0)
      said = self._errors.read()[-500:].decode(errors='replace').strip()
      raise Lost(f'sandbox did not start: {said or type(e).__name__}') from e
    self._ready = True

  def receive(self, deadline: float) -> bytes:
    """One line. Raises TimeoutError, or EOFError for an end or a flood."""
    end = self._read.find(b'\n')
    while end < 0:
      if len(self._read) > MAX_LINE:
        raise EOFError('a message without end')
      _wait(self._out, select.POLLIN, deadline)
      piece = os.read(self._out, 1 << 20)
      if not piece:
        raise EOFError('ended')
      found = piece.find(b'\n')
      end = found if found < 0 else found + len(self._read)
      self._read += piece
    if end >= MAX_LINE:  # the rest would be read as the next message
      raise EOFError('a message too long')
    line = bytes(self._read[:end + 1])
    del self._read[:end + 1]
    return line

  def send(self, data: bytes, deadline: float) -> None:
    """Raises TimeoutError if it is not read, EOFError if it cannot be."""
    data = memoryview(data)  # slices of it are no copies
    while data:
      _wait(self._in, select.POLLOUT, deadline)
      try:
        data = data[os.write(self._in, data):]
      except BlockingIOError:
        continue
      except OSError as e:
        raise EOFError('ended') from e

  def kill(self):
    if self._process.returncode is not None:
      return
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()
    if self._folder:
      shutil.rmtree(self._folder, ignore_errors=True)


def _wait(fd, event, deadline):
  poll = select.poll()
  poll.register(fd, event)
  if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
    raise TimeoutError


@functools.cache
def _no_new_namespaces() -> list[str]:
  """Inside, nobody can make namespaces of their own, where bwrap knows how:
  in them a program could mount, and reach more of the kernel."""
  known = subprocess.run(['bwrap', '--help'], capture_output=True, text=True)
  return ['--disable-userns'] * ('--disable-userns' in known.stdout)


def _isolation(packages: str) -> list[str]:
  """The bubblewrap command before the program's own."""
  spaces, inner = ['--unshare-all', '--unshare-user', *_no_new_namespaces()], []
  if not os.getuid():
    # Root's processes are above the limit on their number, so each sandbox
    # gets a user of its own; only then is its user namespace made.
    user = str(random.randrange(10**6, 2**31))
    spaces = ['--unshare-ipc', '--unshare-pid', '--unshare-net',
              '--unshare-uts', '--unshare-cgroup-try',
              '--cap-add', 'CAP_SETUID', '--cap-add', 'CAP_SETGID']
    inner = ['setpriv', '--reuid', user, '--regid', user, '--clear-groups',
             'bwrap', '--unshare-user', *_no_new_namespaces(),
             '--bind', '/', '/', '--dev-bind', '/dev', '/dev', '--']
  command = ['bwrap', '--die-with-parent', '--new-session', '--cap-drop',
             'ALL', *spaces]
  for folder in ('/usr', '/bin', '/lib', '/lib64'):
    if os.path.islink(folder):
      command += ['--symlink', os.readlink(folder), folder]
    elif os.path.isdir(folder):
      command += ['--ro-bind', folder, folder]
  # Before what may lie in it.
  command += ['--size', str(TMP_BYTES), '--perms', '1777', '--tmpfs', '/tmp']
  for folder in (os.path.realpath(sys.base_prefix), packages):
    for parent in reversed(pathlib.Path(folder).parents[:-1]):
      command += ['--perms', '0755', '--dir', str(parent)]
    command += ['--ro-bind', folder, folder]
  return [*command, '--ro-bind', str(INSIDE), '/inside',
          '--proc', '/proc', '--dev', '/dev', '--size', str(TMP_BYTES),
          '--perms', '1777', '--tmpfs', '/dev/shm', '--remount-ro', '/dev',
          '--chdir', '/tmp', '--remount-ro', '/', *inner]


def probe(sandbox: Sandbox, field: str) -> None:
  """Raises UserError, with what to do, unless programs can be judged here."""
  try:
    verdict = sandbox.judge('', 'def seven():\n  return 7',
                            'assert seven() == 7', 'seven')
    if verdict == 'passed':
      return
  except (Lost, OSError) as e:
    verdict = str(e)
  raise UserError(
      f'{field}: programs cannot be isolated on this machine ({verdict}); '
      'install bubblewrap (apt-get install bubblewrap) and allow user '
      'namespaces (sysctl kernel.unprivileged_userns_clone=1), or, where the '
      'whole machine may be lost, set task.unsafe_subprocess=True')

