import json
import re
import sys

import pytest

from exectune_jax.errors import UserError
from exectune_jax.tasks import load_problems, make_task


def _rows(n):
  return [{'question': f'What is {i} + 1?',
           'answer': f'{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}'}
          for i in range(n)]


def _write(path, rows):
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


def _options(config, name, folder, **more):
  config.task.update(name=name, data_dir=str(folder), train_size=0,
                     validation_size=0, test_size=0, max_number=0, **more)
  return config.task


def test_gsm8k_builder_reads_upstream_files(config, tmp_path):
  _write(tmp_path / 'gsm8k_train.jsonl', _rows(520))
  _write(tmp_path / 'gsm8k_test.jsonl', _rows(7))
  task = make_task(_options(config, 'gsm8k', tmp_path))
  sizes = [len(task.problems(s)) for s in ('train', 'validation', 'test')]
  assert sizes == [20, 500, 7]
  problem = task.problems('test')[3]
  assert (problem.question, problem.answer) == ('What is 3 + 1?', '4')
  config.task.test_size = 5
  assert len(task.problems('test')) == 5
  assert 'tensorflow' not in sys.modules


def test_changed_files_are_read_again(config, tmp_path):
  _write(tmp_path / 'gsm8k_train.jsonl', _rows(501))
  for n in (2, 3):
    _write(tmp_path / 'gsm8k_test.jsonl', _rows(n))
    task = make_task(_options(config, 'gsm8k', tmp_path))
    assert len(task.problems('test')) == n


def test_svamp_builder_and_number_filter(config, tmp_path):
  rows = [{'ID': f'c-{i}', 'Body': f'Dan has {i} dollars.',
           'Question': 'How much is twice that?', 'Equation': '',
           'Answer': 2.0 * i, 'Type': 'Multiplication'} for i in range(1000)]
  (tmp_path / 'svamp.json').write_text(json.dumps(rows))
  task = make_task(_options(config, 'svamp', tmp_path))
  assert [len(task.problems(s)) for s in
          ('train', 'validation', 'test', 'all')] == [600, 100, 300, 1000]
  assert task.problems('all')[5].question == (
      'Dan has 5 dollars. How much is twice that?')
  assert task.problems('all')[5].answer == '10'
  config.task.max_number = 12
  assert [p.answer for p in make_task(config.task).problems('all')] == [
      str(2 * i) for i in range(13)]


def test_jsonl_is_your_own_task(config, tmp_path):
  _write(tmp_path / 'train.jsonl', [{'question': 'q', 'answer': 5}])
  (tmp_path / 'test.jsonl').write_text('')
  task = make_task(_options(config, 'jsonl', tmp_path))
  assert task.problems('train')[0].answer == '5'
  with pytest.raises(UserError, match="split 'test' is empty"):
    load_problems(task, 'test')
  with pytest.raises(UserError, match='there is no validation.jsonl'):
    task.problems('validation')


@pytest.mark.parametrize('line, message', [
    ('{"question": "q", "answer": ', 'train.jsonl:2: not JSON'),
    ('{"question": "q"}', "train.jsonl:2: needs an object with the field "
     "'answer'"),
    ('[1, 2]', "train.jsonl:2: needs an object with the field 'question'")])
def test_malformed_lines_are_named(config, tmp_path, line, message):
  (tmp_path / 'train.jsonl').write_text(
      '{"question": "q", "answer": "1"}\n' + line + '\n')
  task = make_task(_options(config, 'jsonl', tmp_path))
  with pytest.raises(UserError, match=re.escape(message)):
    task.problems('train')


def test_malformed_upstream_files_are_named(config, tmp_path):
  _write(tmp_path / 'gsm8k_test.jsonl', _rows(1))
  (tmp_path / 'gsm8k_train.jsonl').write_text('{"question": 1\n')
  task = make_task(_options(config, 'gsm8k', tmp_path))
  with pytest.raises(UserError, match='gsm8k_train.jsonl:1: not JSON'):
    task.problems('train')
  (tmp_path / 'svamp.json').write_text('[{"Body": "b"}]')
  task = make_task(_options(config, 'svamp', tmp_path))
  with pytest.raises(UserError, match='problem 0: needs Body, Question'):
    task.problems('all')


@pytest.mark.parametrize('name', ['gsm8k', 'svamp'])
def test_missing_directory_names_the_field(config, tmp_path, name):
  task = make_task(_options(config, name, tmp_path / 'nowhere'))
  with pytest.raises(UserError, match=r"task.data_dir='.*nowhere': there is "
                     'no'):
    task.problems('train')


def test_unknown_task(config):
  config.task.name = 'sudoku'
  with pytest.raises(UserError, match="task.name='sudoku'"):
    make_task(config.task)


def test_real_files(config, shared):
  gsm8k = make_task(_options(config, 'gsm8k', shared / 'data'))
  assert [len(gsm8k.problems(s)) for s in ('train', 'validation', 'test')] == [
      6973, 500, 1319]
  svamp = make_task(_options(config, 'svamp', shared / 'data'))
  assert len(svamp.problems('all')) == 1000
  # every reference is right when a core states it
  for problem in gsm8k.problems('test') + svamp.problems('all'):
    assert gsm8k.verify(problem, f'The answer is {problem.answer}.').correct
