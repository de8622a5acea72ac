"""Calls between a program and its tests, which trust each other in nothing.

Plain data travels as JSON. Objects that are not data stay where they are; a
`Remote` stands for one on the other side. What arrives from a program is
never believed: it can send any line it likes.
"""

import builtins
import json
import operator
import os

MAX_LINE = 16 << 20  # bytes of one message
CONTAINERS = {'list': list, 'tuple': tuple, 'set': set,
              'frozenset': frozenset}
# A subclass may compare as it likes; the value in it may not.
PLAIN = {int: int.__pos__, float: float.__pos__, str: str.__str__}
TYPES = {t.__name__: t for t in (
    bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
    object, range, type(None))}
# Values of the standard library: how they are sent, by module and name.
VALUES = {
    ('decimal', 'Decimal'): lambda v: [str(v)],
    ('fractions', 'Fraction'): lambda v: [v.numerator, v.denominator],
    ('datetime', 'date'): lambda v: [v.year, v.month, v.day],
    ('datetime', 'time'): lambda v: [v.hour, v.minute, v.second,
                                     v.microsecond],
    ('datetime', 'datetime'): lambda v: [
        v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond],
    ('datetime', 'timedelta'): lambda v: [v.days, v.seconds, v.microseconds],
    ('collections', 'deque'): lambda v: [list(v), v.maxlen],
    ('collections', 'Counter'): lambda v: [dict(v)],
    ('builtins', 'range'): lambda v: [v.start, v.stop, v.step],
    ('builtins', 'slice'): lambda v: [v.start, v.stop, v.step],
    ('builtins', 'bytearray'): lambda v: [bytes(v)],
    ('numpy', 'ndarray'): lambda v: [v.tolist()],
}

ALONE = {'__len__': len, '__iter__': iter, '__next__': next, '__bool__': bool,
         '__str__': str, '__repr__': repr,
         '__enter__': lambda v: v.__enter__(),
         '__exit__': lambda v, *_: v.__exit__(None, None, None)}
# Only between two objects of the other side: one that claims to equal
# whatever we hold would pass any test.
TOGETHER = {f'__{name}__': getattr(operator, name) for name in (
    'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'add', 'sub', 'mul', 'contains')}
TOGETHER['__instancecheck__'] = lambda kind, value: isinstance(value, kind)


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
    # Protocols ask objects about themselves by such names (numpy does); the
    # other side must not answer.
    if name.startswith('_'):
      raise AttributeError(name)
    return _forward(self, 'getattr', name)

  def __setattr__(self, name, value):
    _forward(self, 'setattr', name, value)

  def __hash__(self):
    return object.__getattribute__(self, '_at')[1]


def _forward(remote, what, /, *args, **kwargs):
  peer, number = object.__getattribute__(remote, '_at')
  return peer.call(number, what, args, kwargs)


def _method(what):
  def method(self, /, *args, **kwargs):
    if what in TOGETHER and not isinstance(args[0], Remote):
      if what == '__contains__':
        return any(args[0] == v for v in self)
      if what == '__instancecheck__':
        return False
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
    self.remotes = {}  # theirs, by number
    self.errors = {}  # exception classes of the other side, by name
    self.decoders = {
        'dict': lambda pairs: {self.decode(k): self.decode(v)
                               for k, v in pairs},
        'complex': complex, 'bytes': bytes.fromhex,
        'yours': self.objects.__getitem__, 'type': TYPES.__getitem__,
        'error': self.error_class, 'new': self.new, 'mine': self.remote}

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
        names, said = [str(n)[:100] for n in rest[0]], self.decode(rest[1])
        error = self.error_class(names)(*said)
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
      if isinstance(e, StopIteration) and what != '__next__':
        e = RuntimeError('StopIteration')  # it would end the caller's loop
      return self.failure(e)

  def failure(self, error):
    """The message that raises an exception on the other side."""
    args = error.args
    if not all(type(a) in (*PLAIN, bool, type(None)) for a in args) or len(
        str(args)) > 1000:
      args = (text_of(error),)
    return ['raise', _names(type(error)), self.encode(list(args))]

  def error_class(self, names):
    """The exception class with these names, from itself to its root."""
    known = getattr(builtins, names[0], None)
    if isinstance(known, type) and issubclass(known, BaseException):
      # Some cannot be made from any arguments.
      return (ValueError if issubclass(known, UnicodeError) else Exception
              if issubclass(known, BaseExceptionGroup) else known)
    if names[0] not in self.errors:
      base = self.error_class(names[1:])
      self.errors[names[0]] = type(names[0], (base,), {})
    return self.errors[names[0]]

  def encode(self, value):
    """Data as JSON; anything else gets a number."""
    if value is None or value is True or value is False:
      return value
    kind = type(value)
    if kind.__module__ == 'solution' and not hasattr(kind, '_fields'):
      return self.number(value)  # a class of the program: methods matter
    if kind.__module__ == 'numpy' and hasattr(value, 'item') and (
        value.ndim == 0):
      value = value.item()
    name = kind.__module__, kind.__name__
    if name in VALUES:
      return ['new', *name, self.encode(VALUES[name](value))]
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
    if isinstance(value, type):
      if TYPES.get(value.__name__) is value:
        return ['type', value.__name__]
      if issubclass(value, BaseException):
        return ['error', _names(value)]
    return self.number(value)

  def number(self, value):
    self.objects[id(value)] = value
    return ['mine', id(value)]

  def decode(self, data):
    """Inverse of `encode` on the other side."""
    if not isinstance(data, list):
      return data
    tag, *rest = data
    if tag in CONTAINERS:
      return CONTAINERS[tag](self.decode(v) for v in rest[0])
    return self.decoders[tag](*rest)

  def new(self, module, name, args):
    if (module, name) not in VALUES:
      raise TypeError(f'{module}.{name} is not sent')
    made = __import__(module)
    return getattr(made, 'array' if module == 'numpy' else name)(
        *self.decode(args))

  def remote(self, number):
    if not isinstance(number, int):
      raise TypeError('objects have numbers')
    return self.remotes.setdefault(number, Remote(self, number))


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


def text_of(error) -> str:
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
    line = self.input.readline(MAX_LINE + 1)
    if not line.endswith(b'\n'):
      os._exit(1)  # closed, or cut: no test may catch this and go on
    return json.loads(line)
