"""What runs inside a sandbox: a program under test, or the tests of programs.

The same script in two sandboxes; sandbox.py carries the lines between them.
The tests call the program by remote calls that carry plain data, so whatever
a program does to its own interpreter, the verdict is reached in another one,
by comparing values there.

Imports the standard library alone, and little of it: every program gets a
process of its own, so the time to start counts.
"""

import json
import os
import resource
import sys
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from remote import Lines, Peer  # noqa: E402

MAX_FILE = 16 << 20  # bytes
MAX_FILES = 64
MAX_PROCESSES = 8
MAX_EXPORT = 1 << 16  # bytes of a global of a program that is sent as data


def serve_program(lines):
  """Runs one program: loads it when asked to, then answers calls."""
  def load(setup, code):
    module = types.ModuleType('solution')
    sys.modules['solution'] = module
    for source in (setup, code):
      exec(compile(source, 'solution.py', 'exec'), module.__dict__)
    return [[name, _exported(peer, value)]
            for name, value in vars(module).items()
            if not (name.startswith('__')
                    or isinstance(value, types.ModuleType))]

  peer = Peer(lines)
  peer.objects[0] = load
  while True:
    message = peer.answer(*lines.receive()[1:])
    try:
      lines.send(message)
    except MemoryError as e:
      lines.send(peer.failure(e))


def _exported(peer, value):
  """A global of the program, as data if it is small."""
  try:
    data = peer.encode(value)
    small = len(json.dumps(data)) <= MAX_EXPORT
  except (RecursionError, MemoryError, ValueError):
    small = False
  return json.dumps(data if small else peer.number(value))


def confine(memory_bytes, cpu_s):
  """Limits of this process and of all that it starts."""
  for limit, value in ((resource.RLIMIT_AS, memory_bytes),
                       (resource.RLIMIT_CPU, cpu_s),
                       (resource.RLIMIT_FSIZE, MAX_FILE),
                       (resource.RLIMIT_NOFILE, MAX_FILES),
                       (resource.RLIMIT_NPROC, MAX_PROCESSES),
                       (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))


def main(role, packages, memory_bytes, cpu_s):
  lines = Lines()
  confine(int(memory_bytes), int(cpu_s))
  sys.path.append(packages)
  sys.set_int_max_str_digits(0)
  serve = serve_program
  if role == 'tests':
    from judging import serve_tests as serve
  del sys.path[0]  # what a program imports is not ours
  lines.send(['ready'])
  serve(lines)


if __name__ == '__main__':
  try:
    main(*sys.argv[1:])
  except BrokenPipeError:
    pass
