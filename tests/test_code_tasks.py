"""Code tasks: data as upstream ships it, verdicts, and the leak check."""

import functools
import gzip
import http.server
import json
import threading

import pytest

from exectune_jax.episode import problem_from, to_dict
from exectune_jax.errors import UserError
from exectune_jax.tasks import make_task, sandbox
from exectune_jax.tasks.verify_code import contains_program, extract_program

SUM = {'task_id': 11, 'text': 'Add two numbers.', 'test_setup_code': '',
       'code': 'def add(a, b):\r\n  return a + b',
       'test_list': ['assert add(1, 2) == 3', 'assert add(-1, 1) == 0'],
       'challenge_test_list': []}
HEAD = {'task_id': 'HumanEval/0', 'entry_point': 'first',
        'prompt': 'from typing import List\n\n\ndef first(x: List[int]) -> '
                  'int:\n    """ The first. """\n',
        'canonical_solution': '    return x[0]\n',
        'test': 'def check(candidate):\n    assert candidate([3, 4]) == 3\n'}
ROW = {'question_id': 'k0', 'question': 'Double it.',
       'solution': 'def double(x):\n  return 2 * x',
       'test': 'from solution import double\n\ndef test_two():\n'
               '  assert double(2) == 4\n\ndef test_text():\n'
               "  assert double('a') == 'aa'\n",
       'test_info': [{'function_name': 'double',
                      'function_declaration': 'def double(x):'}]}


def write(path, rows):
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


@pytest.fixture
def task_of(config):
  made = []
  def make(name, folder='', **options):
    config.task.update(name=name, data_dir=str(folder), train_size=0,
                       validation_size=0, test_size=0, **options)
    made.append(make_task(config.task))
    try:
      made[-1].check()
    except UserError as e:
      pytest.skip(str(e))
    return made[-1]
  yield make
  for task in made:
    task._sandbox.close()


def verdict(task, problem, text):
  found = task.verify(problem, text)
  assert found.correct == (found.extracted == 'passed')
  return found.extracted


def test_mbpp_splits_are_upstreams(task_of, tmp_path):
  numbers = (1, 11, 510, 511, 600, 601, 974)
  write(tmp_path / 'mbpp.jsonl', [SUM | {'task_id': n} for n in numbers])
  task = task_of('mbpp', tmp_path)
  assert [[p.id for p in task.problems(s)] for s in (
      'train', 'validation', 'test')] == [
          ['mbpp-601', 'mbpp-974'], ['mbpp-511', 'mbpp-600'],
          ['mbpp-11', 'mbpp-510']]
  problem = task.problems('test')[0]
  assert problem.question == ('Add two numbers.\nIt must pass these tests:\n'
                              'assert add(1, 2) == 3\nassert add(-1, 1) == 0')
  assert problem.tests.entry_point == 'add'
  assert problem_from(json.loads(json.dumps(to_dict(problem)))) == problem
  assert verdict(task, problem, f'```python\n{problem.answer}\n```') == 'passed'
  assert verdict(task, problem, '').startswith('failed: NameError: the program '
                                               'does not define add')
  assert verdict(task, problem, '```python\ndef add(a, b): return 3\n```'
                 ).startswith('failed: AssertionError')
  assert verdict(task, problem, 'I cannot do that.').startswith(
      'failed: SyntaxError')


def test_sanitized_mbpp_is_read_as_lines_or_as_an_array(task_of, tmp_path):
  row = {'task_id': 12, 'prompt': 'Root.', 'code': 'def root(x):\n  return '
         'math.sqrt(x)', 'test_imports': ['import math'],
         'test_list': ['assert math.isclose(root(4), 2)']}
  for text in (json.dumps(row) + '\n', json.dumps([row], indent=1)):
    (tmp_path / 'mbpp_sanitized.jsonl').write_text(text)
    task = task_of('mbpp_sanitized', tmp_path)
    problem, = task.problems('test')
    assert verdict(task, problem, problem.answer) == 'passed'
  (tmp_path / 'mbpp_sanitized.jsonl').write_text('[\n{"task_id": 3,\n}]')
  with pytest.raises(UserError, match='mbpp_sanitized.jsonl:3: not JSON'):
    task.problems('test')


def test_humaneval_takes_whole_functions_and_completions(task_of, tmp_path):
  write(tmp_path / 'humaneval.jsonl', [HEAD])
  task = task_of('humaneval', tmp_path)
  problem, = task.problems('test')
  assert verdict(task, problem, '    return x[0]\n') == 'passed'
  assert verdict(task, problem, 'Here:\n```python\ndef first(x: List[int]):\n'
                 '  return x[0]\n```\nIt is O(1).') == 'passed'
  assert verdict(task, problem, '    return x[1]\n').startswith(
      'failed: AssertionError')
  assert verdict(task, problem, '').startswith('failed: ')
  with pytest.raises(UserError, match="evaluate.transfer='humaneval'"):
    task.problems('train')


@pytest.fixture
def web(tmp_path):
  """(folder, address) of files that are served over HTTP."""
  folder = tmp_path / 'web'
  folder.mkdir()
  serve = functools.partial(http.server.SimpleHTTPRequestHandler,
                            directory=folder)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), serve) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def test_humaneval_is_downloaded_where_no_directory_is_named(
    config, tmp_path, monkeypatch, web):
  from exectune_jax.tasks import humaneval
  folder, address = web
  (folder / 'HumanEval.jsonl.gz').write_bytes(
      gzip.compress(json.dumps(HEAD).encode() + b'\n'))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'cache'))
  monkeypatch.setattr(humaneval.ExectuneHumaneval, 'URLS',
                      {'test': f'{address}/HumanEval.jsonl.gz'})
  config.task.update(name='humaneval', data_dir='')
  assert [p.id for p in make_task(config.task).problems('test')] == [
      'HumanEval/0']


def test_kodcode_is_the_users_copy(task_of, tmp_path):
  rows = [ROW | {'question_id': f'k{i}'} for i in range(20)]
  rows[19] = {**ROW, 'question_id': 'k19', 'test_info': json.dumps(
      ROW['test_info'])}
  write(tmp_path / 'kodcode.jsonl', rows)
  task = task_of('kodcode', tmp_path)
  assert [[p.id for p in task.problems(s)][-1] for s in (
      'train', 'validation', 'test')] == ['k15', 'k17', 'k19']
  problem = task.problems('test')[0]
  assert problem.question == 'Double it.\nIt must define: def double(x)'
  assert verdict(task, problem, f'```\n{ROW["solution"]}\n```') == 'passed'
  assert verdict(task, problem, 'def double(x): return 4').startswith(
      'failed: AssertionError')
  with pytest.raises(UserError, match=r"task.data_dir='': name a directory "
                     r'that holds kodcode.jsonl'):
    task_of('kodcode').problems('train')


@pytest.mark.parametrize('name, split, number', [
    ('humaneval', 'test', 164),
    ('mbpp_sanitized', 'all', 427),
    pytest.param('mbpp', 'all', 974, marks=pytest.mark.full)])
def test_canonical_solutions_pass_and_others_fail(task_of, shared, name,
                                                  split, number):
  # mbpp-123 needs seconds of a busy machine.
  task = task_of(name, shared / 'data', timeout_s=60.0)
  problems = task.problems(split)
  wrong = [(p.id, v) for p in problems
           if (v := verdict(task, p, p.answer)) != 'passed']
  assert (len(problems), wrong) == (number, [])
  for p in problems[::12]:
    name = p.tests.entry_point
    for text in ('', f'def {name}(*args): return None', f'{name} = 7'):
      assert verdict(task, p, text) != 'passed', (p.id, text)
  # no reference is a strategy, on many lines or on one
  for p in problems:
    assert contains_program(p.answer, p.answer)
    assert contains_program(' '.join(p.answer.split()), p.answer)


def test_problem_statements_hold_no_program(task_of, shared):
  problems = task_of('mbpp', shared / 'data').problems('all')
  assert not [p.id for p in problems if contains_program(
      p.question.partition('\n')[0], p.answer)]


REFERENCE = '''def largest(x, n):
  ordered = sorted(x, reverse=True)
  return ordered[:n]
'''


@pytest.mark.parametrize('strategy, leaks', [
    ('Sort the list from high to low, then take the first n.', False),
    ('1. call sorted(x, reverse=True) 2. keep the first n', False),
    ('Use heapq.nlargest. Return a list.', False),
    ('If n is 0, return an empty list. For each number: compare it.', False),
    ('The result is sorted(x)[-n:], reversed.', False),
    ('ordered = sorted(x, reverse=True)\nreturn ordered[:n]', True),
    ('ordered = sorted(x, reverse=True); return ordered[:n]', True),
    ('first y = sorted(x). y.reverse(). return y[:n]', False),
    ('y = sorted(x)\ny = y[::-1]\nreturn y[:n]', True),
    ('1. y = sorted(x)\n2. y = y[::-1]\n3. return y[:n]', True),
    ('def largest(x, n): return sorted(x)[::-1][:n]', True),
    ('```\nsorted(x)\n```', True),
    ('largest = lambda x, n: sorted(x)[::-1][:n]', True)])
def test_a_strategy_must_not_contain_the_program(strategy, leaks):
  assert contains_program(strategy, REFERENCE) == leaks


@pytest.mark.parametrize('text, program', [
    ('```python\na = 1\n```', 'a = 1\n'),
    ('```py\nx\n```\nthen\n```python\ndef f(): pass\n```\nuse:\n```\nf()\n```',
     'def f(): pass\n'),
    ('```python\ndef f():\n  return 1', 'def f():\n  return 1'),
    ('```Python\r\ndef f(): pass\n```'.replace('\r', ''), 'def f(): pass\n'),
    ('def f(): pass', 'def f(): pass'), ('', ''), ('``` ```', '``` ```'),
    ('    return 1', 'def f():\n    return 1')])
def test_extract_program(text, program):
  assert extract_program(text, 'def f():', 'f').replace('\n\n', '\n') == program


def test_code_tasks_have_no_worked_examples(config):
  config.task.name = 'word_programs'
  with pytest.raises(UserError, match='core.shots=2'):
    make_task(config.task, 2)


def test_no_isolation_stops_a_run_before_the_core_is_asked(
    config, tmp_path, monkeypatch):
  from exectune_jax.cores.service import CoreService
  from exectune_jax.rewards.collector import Executor
  monkeypatch.setattr(sandbox, '_isolation', lambda *_: ['/no/bwrap'])
  config.task.name = 'word_programs'
  with CoreService(config, tmp_path, 'rl') as cores:
    with pytest.raises(UserError, match="task.name='word_programs': programs "
                       'cannot be isolated'):
      Executor(cores, make_task(config.task), config)
