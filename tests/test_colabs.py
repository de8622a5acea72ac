"""Every notebook runs from top to bottom and shows what it says."""

import pathlib
import re

import nbclient
import nbformat
import pytest

COLABS = sorted((pathlib.Path(__file__).parents[1] / 'colabs').glob('*.ipynb'))


# Those that train are for make test-full.
LONG = ('02_train_a_guide', '03_read_a_run', '04_your_task_and_core')


@pytest.mark.parametrize('path', [pytest.param(
    p, id=p.stem, marks=[pytest.mark.full] * (p.stem in LONG))
    for p in COLABS])
def test_notebook_runs(path, tmp_path, monkeypatch):
  notebook = nbformat.read(path, 4)
  code = [c for c in notebook.cells if c.cell_type == 'code']
  lines = sum(len(c.source.splitlines()) for c in code)
  assert len(code) <= 15 and lines <= 66 and not any(c.outputs for c in code)
  assert '%pip install' in code[0].source  # one cell makes it work in Colab
  # Elsewhere than in a copy of the code, whose runs/ it would read.
  monkeypatch.setenv('PYTHONPATH', str(path.parents[1]))
  nbclient.NotebookClient(
      notebook, timeout=240, kernel_name='python3',
      resources={'metadata': {'path': str(tmp_path)}}).execute()
  CHECKS[path.stem]([''.join(_text(o) for o in c.outputs) for c in code])


def _text(output) -> str:
  text = output.get('text') or output.get('data', {}).get('text/plain', '')
  return re.sub(r'\x1b\[[0-9;]*m', '', text)


def _accuracy(printed, system) -> float:
  return float(re.search(rf'^ {system} +([\d.]+)', printed, re.M).group(1))


def _reward(printed):
  assert 'core alone succeeds: 0.0' in printed[4]
  rewards = {line.split()[0]: float(line.split()[2])
             for line in printed[8].splitlines()}
  assert rewards['steps'] > 0.9 and rewards['wrong'] < 0.1
  assert rewards['reveals'] < -0.9  # right, and punished for the leak
  assert 'asked again: 0.0' in printed[9]


def _train(printed):
  assert _accuracy(printed[7], 'core_alone') == 0.0  # it knows no units
  assert _accuracy(printed[7], 'exectune') > _accuracy(printed[7], 'base') > 25
  assert '<strategy>' in printed[8]


def _read(printed):
  assert '16 episodes' in printed[4]  # 4 steps, 2 groups of 2
  assert 'verdict' in printed[4] and 'reward' in printed[4]
  assert re.search(r'^rl:exectune +\d+ calls', printed[7], re.M)


def _own(printed):
  assert _accuracy(printed[6], 'core_alone') == 0.0
  assert _accuracy(printed[6], 'sft') >= 90.0


CHECKS = {'01_reward_by_hand': _reward, '02_train_a_guide': _train,
          '03_read_a_run': _read, '04_your_task_and_core': _own}
