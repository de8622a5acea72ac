"""The side of the tests: reaches a verdict on one program after another."""

import ast
import builtins
import json
import os
import sys
import types

from remote import Peer, text_of

JUDGED = 77  # exit code of tests that have reached a verdict


def serve_tests(lines):
  """Judges one program after another, each in a fork of its own: nothing
  that a program makes the tests do reaches the next one."""
  while True:
    child = os.fork()
    if not child:
      job = lines.receive()
      said = _verdict(Peer(lines), **job)
      lines.send(['verdict', said.encode('ascii', 'replace').decode()[:500]])
      os._exit(JUDGED)
    if os.waitpid(child, 0)[1] != JUDGED << 8:
      return


def _verdict(peer, setup, code, tests, entry_point):
  """'passed', or what went wrong."""
  try:
    _test(peer, setup, code, tests, entry_point)
  except MemoryError:
    return 'memory'
  except BrokenTestsError as e:
    return f'broken tests: {text_of(e)}'
  except ImportError as e:
    if e.name == 'solution':  # it lacks what the tests import from it
      return f'failed: {text_of(e)}'
    whose = '' if hasattr(e, 'from_program') else 'broken tests: '
    return f'{whose}import error: {text_of(e)}'
  except BaseException as e:  # noqa: BLE001 AssertionError, most often
    return f'failed: {type(e).__name__}: {text_of(e)[:300]}'
  return 'passed'


class BrokenTestsError(Exception):
  """The tests cannot judge anybody."""


def _test(peer, setup, code, tests, entry_point):
  exported = peer.call(0, '__call__', (setup, code), {})
  program = {str(name): peer.decode(json.loads(data))
             for name, data in exported if not str(name).startswith('__')}
  if entry_point and entry_point not in program:
    raise NameError(f'the program does not define {entry_point}')
  solution = sys.modules['solution'] = types.ModuleType('solution')
  vars(solution).update(program)
  # The tests have their own copy of the helpers that the problem gives, and
  # the modules that they name; nothing of a program stands in for those, for
  # what is built in, or for a test.
  scope = {'__name__': 'tests'}
  exec(compile(setup, 'setup.py', 'exec'), scope)
  tree = ast.parse(tests)
  for node in ast.walk(tree):
    if isinstance(node, ast.Name) and node.id not in scope and (
        node.id in sys.stdlib_module_names) and node.id != entry_point:
      scope[node.id] = __import__(node.id)
  offered = {name: value for name, value in program.items()
             if name == entry_point or not (
                 name in scope or hasattr(builtins, name)
                 or name in sys.stdlib_module_names
                 or name.lower().startswith('test'))}
  solution.__all__ = list(offered)
  scope.update(offered)
  exec(compile(tree, 'tests.py', 'exec'), scope)
  ran = sum(_run(value) for name, value in list(scope.items())
            if name.lower().startswith('test') and name not in offered)
  acts = (ast.Assert, ast.For, ast.While, ast.With, ast.Try)
  if not ran and not any(
      isinstance(n, acts) or isinstance(getattr(n, 'value', None), ast.Call)
      for n in tree.body):
    raise BrokenTestsError('nothing in them runs')


def _run(test) -> int:
  """Runs what pytest would find under this name; returns how many."""
  if not isinstance(test, type):
    return _run_cases(test) if isinstance(test, types.FunctionType) else 0
  if 'unittest' in sys.modules:
    import unittest
    if issubclass(test, unittest.TestCase):
      result = unittest.TestResult()
      unittest.defaultTestLoader.loadTestsFromTestCase(test).run(result)
      for _, trace in result.errors + result.failures:
        raise AssertionError(trace.strip().rpartition('\n')[2])
      return result.testsRun
  ran = 0
  for name in [n for n in dir(test) if n.startswith('test')]:
    instance = test()
    setup = getattr(instance, 'setup_method', None)
    if setup:
      setup(*[None] * _parameters(setup))
    ran += _run_cases(getattr(instance, name))
  return ran


def _parameters(function) -> int:
  return function.__code__.co_argcount - hasattr(function, '__self__')


def _run_cases(test) -> int:
  """Calls a test once, or for each case of its pytest 'parametrize' marks."""
  cases = [{}]
  for mark in getattr(test, 'pytestmark', ()):
    if mark.name.startswith('skip'):
      return 0
    if mark.name == 'parametrize':
      names, values = (*mark.args, *mark.kwargs.values())[:2]
      alone = isinstance(names, str) and ',' not in names
      if isinstance(names, str):
        names = [n.strip() for n in names.split(',')]
      rows = [v.values if type(v).__name__ == 'ParameterSet'  # pytest.param
              else (v,) if alone else tuple(v) for v in values]
      cases = [{**case, **dict(zip(names, row, strict=True))}
               for case in cases for row in rows]
  given = len(cases[0]) if cases else 0
  if cases and _parameters(test) - len(test.__defaults__ or ()) > given:
    raise BrokenTestsError(f'{test.__name__} needs fixtures')
  for case in cases:
    result = test(**case)
    if isinstance(result, types.CoroutineType):
      import asyncio
      asyncio.run(result)
  return len(cases)
