"""What runs inside a sandbox: a program under test, or the tests of programs.

The same script in two sandboxes; sandbox.py carries the lines between them.
The tests call the program by remote calls that carry plain data, so whatever
a program does to its own interpreter, the verdict is reached in another one,
by comparing values there. Objects that are not data stay where they are; a
`Remote` stands for one on the other side.

Imports the standard library alone, and little of it: every program gets a
process of its own, so the time to start counts.
"""

import builtins
import json
import operator
import os
import resource
import sys
import types

MAX_LINE = 16 << 20  # bytes of one message
MAX_FILE = 16 << 20  # bytes
MAX_PROCESSES = 32
CONTAINERS = {'list': list, 'tuple': tuple, 'set': set,
              'frozenset': frozenset}
# A subclass may compare as it likes; the value in it may not.
PLAIN = {int: int.__pos__, float: float.__pos__, str: str.__str__}

ALONE = {'__len__': len, '__iter__': iter, '__next__': next, '__bool__': bool,
         '__str__': str, '__repr__': repr}
# Only between two objects of the other side: one that claims to equal
# whatever we hold would pass any test.
TOGETHER = {f'__{name}__': getattr(operator, name) for name in (
    'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'add', 'sub', 'mul')}


def _call(target, *args, **kwargs):
  return target(*args, **kwargs)


def _attribute(action):
  def checked(target, name, *value):
    # From a function or a frame all of an interpreter can be reached.
    if name.startswith(('_', 'f_', 'gi_', 'cr_', 'ag_', 'tb_', 'co_')):
      raise AttributeError(name)
    return action(target, name, *value)
  return checked


OPERATIONS = {
    '__call__': _call, '__getitem__': operator.getitem,
    '__setitem__': operator.setitem, 'getattr': _attribute(getattr),
    'setattr': _attribute(setattr), **ALONE, **TOGETHER}


class Remote:
  """An object of the other side."""

  def __init__(self, peer, number):
    object.__setattr__(self, '_at', (peer, number))

  def __getattr__(self, name):
    return _forward(self, 'getattr', name)

  def __setattr__(self, name, value):
    _forward(self, 'setattr', name, value)


def _forward(remote, what, *args, **kwargs):
  peer, number = object.__getattribute__(remote, '_at')
  return peer.call(number, what, args, kwargs)


def _method(what):
  def method(self, *args, **kwargs):
    if what in TOGETHER and not isinstance(args[0], Remote):
      return NotImplemented
    return _forward(self, what, *args, **kwargs)
  return method


for _what in OPERATIONS:
  if _what.startswith('__'):
    setattr(Remote, _what, _method(_what))


class Peer:
  """One end of the line. Calls nest: a function that is called may call."""

  def __init__(self, lines):
    self.lines = lines
    self.objects = {}  # ours that the other side knows, by number
    self.errors = {}  # exception classes of the other side, by name

  def call(self, number, what, args, kwargs):
    """Result of a call on the other side; its exceptions arrive here."""
    self.lines.send(['call', number, what, self.encode(list(args)),
                     self.encode(kwargs)])
    while True:
      kind, *rest = self.lines.receive()
      if kind == 'call':
        self.lines.send(self.answer(*rest))
      elif kind == 'value':
        value, after = map(self.decode, rest)
        for mine, theirs in zip(args, after, strict=True):
          _update(mine, theirs)
        return value
      else:
        error = self.error_class(rest[0])(rest[1])
        error.from_program = True
        raise error

  def answer(self, number, what, args, kwargs):
    """The message that answers a call of the other side."""
    try:
      args = self.decode(args)
      value = OPERATIONS[what](self.objects[number], *args,
                               **self.decode(kwargs))
      # With what it did to its arguments: Python passes them by reference.
      return ['value', self.encode(value), self.encode(args)]
    except BaseException as e:  # noqa: BLE001 theirs to handle
      return ['raise', _names(type(e)), _text(e)]

  def error_class(self, names):
    """The exception class with these names, from itself to its root."""
    known = getattr(builtins, names[0], None)
    if isinstance(known, type) and issubclass(known, BaseException):
      # Some cannot be made from a text alone.
      return ValueError if issubclass(known, UnicodeError) else known
    if names[0] not in self.errors:
      base = self.error_class(names[1:])
      self.errors[names[0]] = type(names[0], (base,), {})
    return self.errors[names[0]]

  def encode(self, value):
    """Data as JSON; anything else gets a number."""
    if value is None or value is True or value is False:
      return value
    for kind, plain in PLAIN.items():
      if isinstance(value, kind):
        return plain(value)
    for tag, kind in CONTAINERS.items():
      if isinstance(value, kind):
        return [tag, [self.encode(v) for v in kind.__iter__(value)]]
    if isinstance(value, dict):
      return ['dict', [[self.encode(k), self.encode(v)]
                       for k, v in dict.items(value)]]
    if isinstance(value, complex):
      return ['complex', value.real, value.imag]
    if isinstance(value, bytes):
      return ['bytes', value.hex()]
    if isinstance(value, Remote):
      return ['yours', object.__getattribute__(value, '_at')[1]]
    if isinstance(value, types.ModuleType):
      return ['module', value.__name__]
    if isinstance(value, type):
      if getattr(builtins, value.__name__, None) is value:
        return ['type', value.__name__]
      if issubclass(value, BaseException):
        return ['error', _names(value)]
    self.objects[id(value)] = value
    return ['mine', id(value)]

  def decode(self, data):
    """Inverse of `encode` on the other side."""
    if not isinstance(data, list):
      return data
    tag, *rest = data
    if tag in CONTAINERS:
      return CONTAINERS[tag](self.decode(v) for v in rest[0])
    return {'dict': lambda pairs: {self.decode(k): self.decode(v)
                                   for k, v in pairs},
            'complex': complex, 'bytes': bytes.fromhex,
            'yours': self.objects.__getitem__,
            'module': _module,
            'type': lambda name: getattr(builtins, name),
            'error': self.error_class,
            'mine': lambda number: Remote(self, number)}[tag](*rest)


def _module(name):
  """Our own copy of a module of the standard library, or nothing."""
  if name.partition('.')[0] in sys.stdlib_module_names:
    return __import__(name, fromlist=['*'])
  return None


def _update(mine, theirs):
  """Makes a list, dict or set of ours what a call has made of its copy."""
  if isinstance(mine, list) and isinstance(theirs, list):
    if mine != theirs:
      mine[:] = theirs
  elif isinstance(mine, dict | set) and isinstance(theirs, dict | set):
    if mine != theirs:
      mine.clear()
      mine.update(theirs)


def _names(error_class):
  return [c.__name__ for c in error_class.__mro__[:-1]]


def _text(error):
  try:
    return str(error)[:1000]
  except Exception:  # noqa: BLE001 a text is all that is lost
    return ''


class Lines:
  """JSON messages, one a line, over what were stdin and stdout."""

  def __init__(self):
    self.input = os.fdopen(os.dup(0), 'rb')
    self.output = os.fdopen(os.dup(1), 'wb')
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
      os.dup2(nothing, fd)

  def send(self, message):
    line = json.dumps(message).encode()
    if len(line) >= MAX_LINE:
      raise MemoryError('value too large')
    self.output.write(line + b'\n')
    self.output.flush()

  def receive(self):
    line = self.input.readline(MAX_LINE)
    if not line.endswith(b'\n'):
      raise EOFError('the line was closed')
    return json.loads(line)


def serve_program(lines):
  """Runs one program: loads it when asked to, then answers calls."""
  def load(setup, code):
    module = types.ModuleType('solution')
    sys.modules['solution'] = module
    for source in (setup, code):
      exec(compile(source, 'solution.py', 'exec'), module.__dict__)
    return {name: value for name, value in vars(module).items()
            if not name.startswith('__')}

  peer = Peer(lines)
  peer.objects[0] = load
  while True:
    message = peer.answer(*lines.receive()[1:])
    try:
      lines.send(message)
    except MemoryError as e:
      lines.send(['raise', _names(type(e)), _text(e)])


def serve_tests(lines):
  """Judges one program after another."""
  while True:
    job = lines.receive()
    lines.send(['verdict', _verdict(Peer(lines), **job)])


def _verdict(peer, setup, code, tests, entry_point):
  """'passed', or what went wrong."""
  try:
    _test(peer, setup, code, tests, entry_point)
  except MemoryError:
    return 'memory'
  except ImportError as e:
    whose = '' if hasattr(e, 'from_program') else 'broken tests: '
    return f'{whose}import error: {_text(e)}'
  except BaseException as e:  # noqa: BLE001 AssertionError, most often
    return f'failed: {type(e).__name__}: {_text(e)[:300]}'
  return 'passed'


def _test(peer, setup, code, tests, entry_point):
  program = peer.call(0, '__call__', (setup, code), {})
  if entry_point and entry_point not in program:
    raise NameError(f'the program does not define {entry_point}')
  sys.modules['solution'] = types.ModuleType('solution')
  vars(sys.modules['solution']).update(program)
  # The tests have their own copy of the helpers that the problem gives.
  scope = {'__name__': 'tests'}
  exec(compile(setup, 'setup.py', 'exec'), scope)
  # A program that defines its own len() or abs() is not asked with them.
  scope.update((name, value) for name, value in program.items()
               if name == entry_point
               or name not in scope and not hasattr(builtins, name))
  before = set(scope)
  exec(compile(tests, 'tests.py', 'exec'), scope)
  for name, test in list(scope.items()):  # as pytest finds them
    if name.startswith('test') and name not in before and callable(test):
      _run_marked(test)


def _run_marked(test):
  """Calls a test once, or for each case of its pytest 'parametrize' marks."""
  cases = [{}]
  for mark in getattr(test, 'pytestmark', ()):
    if mark.name == 'parametrize':
      names, values = mark.args[:2]
      if isinstance(names, str):
        names = [n.strip() for n in names.split(',')]
      rows = [v if len(names) > 1 else (v,) for v in values]
      cases = [{**case, **dict(zip(names, row, strict=True))}
               for case in cases for row in rows]
  for case in cases:
    test(**case)


def confine(memory_bytes, cpu_s, user):
  """Limits of this process and of all that it starts."""
  for limit, value in ((resource.RLIMIT_AS, memory_bytes),
                       (resource.RLIMIT_CPU, cpu_s),
                       (resource.RLIMIT_FSIZE, MAX_FILE),
                       (resource.RLIMIT_NPROC, MAX_PROCESSES),
                       (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
  if user:  # root would be above the limit on processes
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def main(role, packages, memory_bytes, cpu_s, user):
  lines = Lines()
  confine(int(memory_bytes), int(cpu_s), int(user))
  sys.path.append(packages)
  sys.set_int_max_str_digits(0)
  lines.send(['ready'])
  (serve_program if role == 'program' else serve_tests)(lines)


if __name__ == '__main__':
  try:
    main(*sys.argv[1:])
  except (EOFError, BrokenPipeError):
    pass
