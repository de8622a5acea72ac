"""Programs that mean harm, and tests that must not be fooled by them."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time

import pytest

from exectune_jax.errors import Lost, UserError
from exectune_jax.tasks import sandbox as sandbox_lib
from exectune_jax.tasks.sandbox import Sandbox, probe

PRIVATE = [os.path.expanduser('~'), os.getcwd(), '/etc', '/var', '/home',
           tempfile.gettempdir()]
INTERPRETER = [os.path.realpath(sys.base_prefix), sysconfig.get_path('purelib')]


def boxed(timeout_s):
  box = Sandbox(timeout_s, memory_mb=512)
  try:
    probe(box, 'test')
  except UserError as e:
    pytest.skip(str(e))
  yield box
  box.close()


@pytest.fixture(scope='module')
def sandbox():
  yield from boxed(20.0)


@pytest.fixture(scope='module')
def hasty():
  yield from boxed(1.5)


def right(sandbox):
  """The next program after a hostile one is judged as if nothing was."""
  return sandbox.judge('', 'def f(x):\n  return x + 1', 'assert f(2) == 3',
                       'f') == 'passed'


# name: (program, tests, verdict). Where a program reports what it could do,
# the tests say what it must not have been able to.
HOSTILE = {
    'infinite loop': ('def f():\n  while True: pass', 'f()', 'timeout'),
    'endless at import': ('while True: pass', '', 'timeout'),
    'sleep': ('import time\ndef f(): time.sleep(60)', 'f()', 'timeout'),
    'deaf and mute': ('import os, time\nfor i in range(3, 20):\n  try: '
                      'os.close(i)\n  except OSError: pass\ntime.sleep(60)',
                      '', 'timeout'),
    'fork bomb': ('''
import os, time
def f():
  made = 0
  try:
    while made < 500:
      if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
      made += 1
  except OSError:
    pass
  return made
''', 'assert 0 < f() < 64', 'passed'),
    '10 GB': ('def f(): return len(bytearray(10 << 30))', 'f()', 'memory'),
    '10 GB in pieces': ('def f():\n  kept = []\n  while True:\n    kept.append('
                        'bytearray(10 << 20))', 'f()', 'memory'),
    'large answer': ('def f(): return "x" * (100 << 20)', 'f()', 'memory'),
    'fill the disk': ('''
import os
def f():
  written = 0
  for folder in ('/tmp', '/dev/shm', '/', '/dev', '/usr'):
    for i in range(40):
      try:
        with open(f'{folder}/fill{i}', 'wb') as file:
          while True:
            written += file.write(bytes(1 << 20))
      except OSError:
        pass
  return written >> 20
''', 'assert f() <= 130, f()', 'passed'),
    'read home': ('''
import os
def f(folders, interpreter):
  found = []
  for folder in folders:
    for root, inside, files in os.walk(folder):
      inside[:] = [d for d in inside if f'{root}/{d}' not in interpreter]
      found += [f'{root}/{name}' for name in files]
  return found
''', f'assert f({PRIVATE!r}, {INTERPRETER!r}) == [], '
     f'f({PRIVATE!r}, {INTERPRETER!r})[:5]', 'passed'),
    'read the environment': ('''
import glob, os
def f():
  said = repr(dict(os.environ))
  for path in glob.glob('/proc/*/environ'):
    try: said += open(path, 'rb').read().decode()
    except OSError: pass
  return said
''', 'assert "EXECTUNE" not in f() and "PATH" in f()', 'passed'),
    'network': ('''
import socket
def f(port):
  try: socket.create_connection(('127.0.0.1', port), 2)
  except OSError: pass
  else: return 'loopback'
  try: socket.create_connection(('1.1.1.1', 53), 2)
  except OSError: pass
  else: return 'internet'
  return [name for _, name in socket.if_nameindex()]
''', 'assert f(PORT) == ["lo"], f(PORT)', 'passed'),
    'kill the parent': ('''
import os, signal
def f():
  for pid in (os.getppid(), -1, 1, *range(2, 400)):
    if pid != os.getpid():
      try: os.kill(pid, signal.SIGKILL)
      except OSError: pass
  return 1
''', 'assert f() == 2', 'failed'),
    'be root': ('''
import os
def f():
  done = []
  def namespace():  # as a user's own root one may mount, and more
    import ctypes
    if ctypes.CDLL(None).unshare(0x10000000): raise OSError
  for attempt in (lambda: os.setuid(0), lambda: os.chroot('/tmp'),
                  lambda: os.nice(-5), namespace):
    try: attempt(); done.append(attempt)
    except (OSError, AttributeError): pass
  caps = [l for l in open('/proc/self/status') if l.startswith('CapEff')]
  return len(done), int(caps[0].split()[1], 16)
''', 'assert f() == (0, 0), f()', 'passed'),
    'write the verdict': ('''
import os
def f(x):
  for fd in range(1, 20):
    try: os.write(fd, b'["verdict", "passed"]\\n')
    except OSError: pass
  return 0
''', 'assert f(2) == 3', 'failed'),
    'write the verdict at import': ('''
import os
for fd in range(1, 20):
  try: os.write(fd, b'["verdict", "passed"]\\n' * 3)
  except OSError: pass
os._exit(0)
''', 'assert f(2) == 3', 'failed'),
    'print 1 GB': ('def f():\n  for _ in range(64): print("x" * (1 << 24))'
                   '\n  return 1', 'assert f() == 1', 'passed'),
    'flood the line': ('''
import os
def f():
  for fd in range(3, 20):
    try:
      while True: os.write(fd, b'x' * (1 << 20))
    except OSError: pass
''', 'f()', 'failed: ProgramEnded'),
    'patch the harness': ('''
import builtins, json, operator, sys
class Yes(Exception):
  def __init__(self, *a): pass
builtins.AssertionError = Yes
operator.eq = lambda a, b: True
for name, module in list(sys.modules.items()):
  for key, value in list(vars(module).items()):
    if callable(value) and 'verdict' in key.lower():
      setattr(module, key, lambda *a, **k: 'passed')
def f(x): return 0
''', 'assert f(2) == 3', 'failed: AssertionError'),
    'equal to everything': ('''
class Any:
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  def __lt__(self, other): return True
  __gt__ = __le__ = __ge__ = __lt__
  def __sub__(self, other): return 0
  __rsub__ = __sub__
  def __contains__(self, item): return True
  def __hash__(self): return 1
  def __len__(self): return 3
def f(x): return Any()
''', 'assert f(2) == 3', 'failed: AssertionError'),
    'a number that lies': ('class N(int):\n  def __eq__(self, o): return True\n'
                           'def f(x): return N(7)', 'assert f(2) == 3',
                           'failed: AssertionError'),
    'reach through a callback': ('''
def f(callback):
  return callback.__globals__
''', 'f(lambda: 1)', 'failed: AttributeError: __globals__'),
    'raw reach through a callback': ('''
def f(callback):
  peer, number = object.__getattribute__(callback, '_at')
  return peer.call(number, 'getattr', ['__globals__'], {})
''', 'f(lambda: 1)', 'failed: AttributeError: __globals__'),
    'exit 0 early': ('import sys\nsys.exit(0)', 'assert f(2) == 3',
                     'failed: SystemExit'),
    'exit 0 in the call': ('import os\ndef f(x): os._exit(0)',
                           'try:\n  f(2)\nexcept Exception:\n  pass',
                           'failed: ProgramEnded'),
    'no error where one is due': (
        'import os\ndef f(x): os._exit(1)',
        'try:\n  f(2)\nexcept ValueError: pass\nelse: assert 0',
        'failed: ProgramEnded'),
    'tests of its own': (
        'def double(x): return 0\ndef test_two(): pass',
        'from solution import double\ndef test_two():\n'
        '  assert double(2) == 4', 'failed: AssertionError'),
    'names that are built in': (
        'def abs(x): return 0\ndef sorted(x): return [1]\nclass math:\n'
        '  isclose = lambda *a: True\ndef f(x): return 1',
        'import math\nfrom solution import *\nassert abs(f(2) - 3) < 1e-6',
        'failed: AssertionError'),
    'a module that the tests forgot to import': (
        'class sys:\n  class R:\n    def __eq__(s, o): return True\n  '
        'getsizeof = lambda x: sys.R()\ndef f(t): return sys.R()',
        'assert f((1,)) == sys.getsizeof((1,))', 'failed: AssertionError'),
    'protocols of numpy': ('''
import remote
remote.OPERATIONS['getattr'] = getattr
class A:
  __array_interface__ = {'shape': (0,), 'typestr': '<f8', 'data': (0, True),
                         'version': 3}
  __array__ = 5
def f(x): return A()
''', 'import numpy as np\nassert np.allclose(f(2), 3.0)', 'failed: '),
    'an end of iteration': (
        'def f(x): raise StopIteration',
        'assert all(a == b for a, b in zip(map(f, [1, 2]), [2, 3]))',
        'failed: RuntimeError'),
    'the type of exec': ('''
import remote
old = remote.Peer.encode
def encode(peer, value):
  return ['type', 'exec'] if value == 'now' else old(peer, value)
remote.Peer.encode = encode
def f(g): return g(["__import__('os')._exit(0)", ''], 'now')
''', 'assert f(lambda x, key: sorted(x, key=key)) == 3', 'failed: '),
    'a line that is cut into two': ('''
import json, os
def f(x):
  job = {'setup': '', 'code': '', 'tests': '1 / 0', 'entry_point': ''}
  data = b'x' * (16 << 20) + json.dumps(job).encode() + b'\\n'
  for fd in range(3, 20):
    try:
      sent = 0
      while sent < len(data): sent += os.write(fd, data[sent:])
    except OSError: pass
''', 'assert f(2) == 3', 'failed: ProgramEnded'),
    'changes to what is shared': (
        'def f(c):\n  c.most_common = lambda *a: []\n  c.elements = 5',
        'import collections\nf(collections.Counter)\nassert 0',
        'failed: AssertionError'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_program(sandbox, hasty, name, monkeypatch, free_port):
  monkeypatch.setenv('EXECTUNE_SECRET', 'sk-secret')
  program, tests, verdict = HOSTILE[name]
  tests = tests.replace('PORT', str(free_port))
  box = hasty if verdict == 'timeout' else sandbox
  began = time.monotonic()
  found = box.judge('', program, tests)
  assert found.startswith(verdict), found
  assert verdict != 'timeout' or 1.5 < time.monotonic() - began < 30
  assert right(box)


@pytest.fixture
def free_port():
  """A port of this machine's loopback on which somebody listens."""
  import socket
  with socket.create_server(('127.0.0.1', 0)) as server:
    yield server.getsockname()[1]


def _running(marker):
  """Whether any process has the marker in its command line."""
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      if marker in path.read_bytes().replace(b'\0', b' ').decode():
        return True
    except (FileNotFoundError, ProcessLookupError):
      continue
  return False


def _ends(marker):
  deadline = time.monotonic() + 30
  while _running(marker):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_background_processes_end_with_the_program(sandbox):
  marker = f'3.1{os.getpid()}'
  program = f'''
import os, subprocess, sys
def f():
  for _ in range(3):
    subprocess.Popen([sys.executable, '-S', '-c', 'import os, time;'
                      'os.setsid(); time.sleep({marker}e3)'])
  if os.fork() == 0:
    os.setsid()
    os.execv(sys.executable, [sys.executable, '-S', '-c',
                              'import time; time.sleep({marker}e3)'])
  import time; time.sleep(0.3)
  return 1
'''
  assert sandbox.judge('', program, 'assert f() == 1', 'f') == 'passed'
  _ends(marker)


def test_a_killed_grader_takes_its_sandboxes_along():
  megabytes = 300 + os.getpid() % 97  # stands in the command line
  grader = subprocess.Popen([sys.executable, '-c', f'''
from exectune_jax.tasks.sandbox import Sandbox
Sandbox(60, {megabytes}).judge('', 'while True: pass', '')'''])
  marker = f'/inside/worker.py program {INTERPRETER[1]} {megabytes << 20}'
  while not _running(marker):
    assert grader.poll() is None
    time.sleep(0.05)
  time.sleep(1)  # into the loop, where it does not read
  grader.kill()
  grader.wait()
  _ends(marker)


def test_closing_leaves_nothing():
  box = Sandbox(2.0, memory_mb=512)
  probe(box, 'test')
  pids = [box._tests._process.pid, box._next._process.pid]
  box.close()
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


# What honest programs and their tests do with each other.
FAIR = {
    'values of the library': (
        'def f(x): return x', '''
import collections, datetime, decimal, fractions, numpy
for v in (decimal.Decimal('1.10'), fractions.Fraction(1, 3), range(1, 9, 2),
          datetime.date(2026, 1, 2), datetime.timedelta(days=1.5),
          datetime.datetime(2026, 1, 2, 3, 4), collections.deque([1], 3),
          bytearray(b'x'),
          collections.Counter('aab'), slice(1, None)):
  assert f(v) == v and type(f(v)) is type(v), v
assert f(numpy.float64(2.5)) == 2.5 and f(numpy.int64(3)) == 3
assert numpy.allclose(f(numpy.eye(2)), numpy.eye(2))
'''),
    'a class that is a container': ('''
import collections
class Cache(collections.OrderedDict):
  def put(self, k, v): self[k] = v
''', 'c = Cache()\nc.put("a", 1)\nassert c["a"] == 1 and len(c) == 1\n'
     'assert "a" in c and isinstance(c, Cache)\n'
     'assert not isinstance(1, Cache)'),
    'names of arguments': (
        'def f(self, remote, what, args): return self + remote + what + args',
        'assert f(self=1, remote=2, what=3, args=4) == 10'),
    'the same object': (
        'class S: pass\ns = S()\ndef f(): return s',
        'assert f() is f() and f() == f() and len({f(), f()}) == 1'),
    'arguments of an exception': (
        'def f(x): raise KeyError("k", 3)',
        'try: f(1)\nexcept KeyError as e: assert e.args == ("k", 3)'),
    'tests in classes': (
        'def f(x): return x + 1', '''
import pytest, unittest
from solution import f
class TestF:
  def setup_method(self): self.x = 1
  def test_one(self): assert f(self.x) == 2
  @pytest.mark.parametrize(['a'], [(1,), pytest.param(2, id='two')])
  def test_many(self, a): assert f(a) == a + 1
class Other(unittest.TestCase): pass
class TestU(unittest.TestCase):
  def test_one(self): self.assertEqual(f(1), 2)
async def test_later(): assert f(1) == 2
'''),
    'large and circular globals': (
        'table = [True] * 4 * 10 ** 6\nme = []\nme.append(me)\n'
        'def f(): return len(table)', 'assert f() == 4 * 10 ** 6'),
    'data of every kind': (
        'def f(x): return x',
        'for v in (None, True, 3, -0.0, 2.5, "ä\\ud800", b"b", (1, 2), [1], '
        '{1}, frozenset([2]), {(1, 2): [3]}, 1j, 10**5000, float("inf"), int):'
        '\n  assert f(v) == v and type(f(v)) is type(v), v\n'
        'import math\nassert math.copysign(1, f(-0.0)) == -1'),
    'in place': ('def f(x, d, s):\n  x.sort(); d["k"] = 1; s.add(3)',
                 'x, d, s = [3, 1], {}, set()\nassert f(x, d, s) is None\n'
                 'assert (x, d, s) == ([1, 3], {"k": 1}, {3})'),
    'generator': ('def f(n):\n  yield from range(n)',
                  'assert list(f(4)) == [0, 1, 2, 3]\nassert 3 in f(4)\n'
                  'assert sum(f(4)) == 6'),
    'callback': ('def f(g, x): return [g(v) for v in x]',
                 'assert f(lambda v: v * 2, [1, 2]) == [2, 4]'),
    'callback that fails': (
        'def f(g):\n  try: return g()\n  except KeyError: return "caught"',
        'def g(): raise KeyError("k")\nassert f(g) == "caught"'),
    'classes': ('''
class V:
  def __init__(self, x): self.x = x
  def __add__(self, o): return V(self.x + o.x)
  def __eq__(self, o): return self.x == o.x
  def __str__(self): return f"V{self.x}"
''', 'a = V(1) + V(2)\nassert a.x == 3 and a == V(3) and a != V(4)\n'
     'assert str(a) == "V3"\na.x = 5\nassert a.x == 5\nassert not a == 3'),
    'errors of their own': (
        'class TooLow(ValueError): pass\n'
        'def f(x):\n  if x < 0: raise TooLow("below 0")\n  return {}[x]',
        'try: f(-1)\nexcept TooLow as e: assert str(e) == "below 0"\n'
        'else: assert 0\ntry: f(1)\nexcept KeyError: pass\nelse: assert 0'),
    'named tuples compare as tuples': (
        'import collections\nP = collections.namedtuple("P", "x y")\n'
        'def f(): return P(1, 2), collections.Counter("aab")',
        'assert f() == ((1, 2), {"a": 2, "b": 1})'),
    'state between calls': ('n = 0\ndef f():\n  global n\n  n += 1\n  return n',
                            'assert [f(), f(), f()] == [1, 2, 3]'),
    'pytest style': (
        'def f(x):\n  if x < 0: raise ValueError\n  return x + 1',
        'import pytest\nfrom solution import f\n'
        'def test_one(): assert f(1) == 2\n'
        '@pytest.mark.parametrize("a, b", [(1, 2), (2, 3)])\n'
        'def test_many(a, b): assert f(a) == b\n'
        'def test_error():\n  with pytest.raises(ValueError): f(-1)'),
}


@pytest.mark.parametrize('name', FAIR)
def test_fair_program_passes(sandbox, name):
  assert sandbox.judge('', *FAIR[name]) == 'passed'


@pytest.mark.parametrize('program, tests, verdict', [
    ('def f(x) return x', 'f(1)', 'failed: SyntaxError: '),
    ('import nonesuch', 'f(1)', "import error: No module named 'nonesuch'"),
    ('def f(x): import nonesuch', 'f(1)', 'import error: '),
    ('def f(x): return 1 / 0', 'f(1)', 'failed: ZeroDivisionError'),
    ('def f(x): return f(x)', 'f(1)', 'failed: RecursionError'),
    ('def g(x): return x', 'f(1)', 'failed: NameError'),
    ('def g(x): return x', 'from solution import f\ndef test(): f(1)',
     "failed: cannot import name 'f'"),
    ('def f(x): return 0', 'class TestF:\n  def test_a(self): assert f(1)',
     'failed: AssertionError'),
    ('def f(x): return 0', 'import unittest\nclass A(unittest.TestCase):\n'
     '  pass\nclass TestF(A):\n  def test_a(self): self.assertTrue(f(1))',
     'failed: AssertionError'),
    ('def f(x): return 0', 'async def test_a(): assert f(1)',
     'failed: AssertionError'),
    ('def f(x): return x', 'from solution import f\ndef test_a(): assert '
     'f(1) == 1\ndef test_b(): assert f(1) == 2', 'failed: AssertionError')])
def test_verdict_says_what_went_wrong(sandbox, program, tests, verdict):
  assert sandbox.judge('', program, tests).startswith(verdict)


def test_helpers_of_the_problem_are_the_tests_own(sandbox):
  setup = 'def twice(x): return 2 * x\ndef f(x): "helped by twice"'
  program = 'def twice(x): return 0\ndef f(x): return 0'
  assert sandbox.judge(setup, program, 'assert f(1) == twice(1)', 'f'
                       ).startswith('failed: AssertionError')
  assert sandbox.judge(setup, 'def f(x): return twice(x)',
                       'assert f(1) == twice(1)', 'f') == 'passed'
  assert sandbox.judge(setup, '', 'assert f(1) == twice(1)', 'f'
                       ).startswith('failed: AssertionError')


def test_broken_tests_are_lost_not_wrong(sandbox):
  for tests, said in (
      ('import nonesuch', 'import error'),
      ('def test_a(tmp_path): f()', 'test_a needs fixtures'),
      ('if __name__ == "__main__":\n  f()', 'nothing in them runs'),
      ('"""Tests of f."""\ndef check(): assert f()', 'nothing in them runs')):
    with pytest.raises(Lost, match=f'broken tests: {said}'):
      sandbox.judge('', 'def f(): pass', tests)
  assert right(sandbox)


def test_an_interruption_leaves_nobody_in_mid_conversation(sandbox,
                                                           monkeypatch):
  plain, calls = sandbox_lib._Process.receive, []
  def receive(self, deadline):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return plain(self, deadline)
  with monkeypatch.context() as patch:
    patch.setattr(sandbox_lib._Process, 'receive', receive)
    with pytest.raises(KeyboardInterrupt):
      sandbox.judge('', 'def f(x): return x', 'assert f(1) == 1')
  assert right(sandbox)


def test_an_end_of_the_tests_themselves_is_lost(sandbox):
  with pytest.raises(Lost, match='interpreter of the tests ended'):
    sandbox.judge('', 'def f(): pass', 'import os\nos._exit(0)')
  assert right(sandbox)


def test_unsafe_subprocess_judges_as_well():
  box = Sandbox(1.0, memory_mb=512, unsafe=True)
  try:
    assert right(box)
    assert box.judge('', 'while True: pass', '') == 'timeout'
    assert box.judge('', HOSTILE['10 GB'][0], 'f()') == 'memory'
    assert box.judge('', *HOSTILE['write the verdict'][:2]
                     ).startswith('failed')
    assert right(box)
  finally:
    box.close()


def test_no_isolation_is_refused_with_instructions(monkeypatch):
  monkeypatch.setattr(sandbox_lib, '_isolation', lambda *_: [
      sys.executable, '-c', 'import sys; sys.exit("bwrap: No permissions to '
      'create new namespace")'])
  box = Sandbox(1.0, memory_mb=512)
  with pytest.raises(UserError, match=r"task.name='mbpp': programs cannot be "
                     r'isolated .*No permissions.*apt-get install bubblewrap'
                     r'.*task.unsafe_subprocess=True'):
    probe(box, "task.name='mbpp'")
  monkeypatch.setattr(sandbox_lib, '_isolation', lambda *_: ['/no/bwrap'])
  with pytest.raises(UserError, match='isolated'):
    probe(Sandbox(1.0, memory_mb=512), "task.name='mbpp'")
