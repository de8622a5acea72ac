"""Every notebook runs from top to bottom and shows what it says."""

import pathlib

import nbclient
import nbformat
import pytest

COLABS = sorted((pathlib.Path(__file__).parents[1] / 'colabs').glob('*.ipynb'))


@pytest.mark.parametrize('path', COLABS, ids=lambda p: p.stem)
def test_notebook_runs(path):
  notebook = nbformat.read(path, 4)
  code = [c for c in notebook.cells if c.cell_type == 'code']
  assert len(code) <= 15 and not any(c.outputs for c in code)
  nbclient.NotebookClient(
      notebook, timeout=120, kernel_name='python3',
      resources={'metadata': {'path': str(path.parents[1])}}).execute()
  printed = [''.join(o.get('text', '') for o in c.outputs) for c in code]
  if path.stem == '01_reward_by_hand':
    assert 'core alone succeeds: 0.0' in printed[3]
    rewards = {line.split()[0]: float(line.split()[2])
               for line in printed[7].splitlines()}
    assert rewards['steps'] > 0.9 and rewards['wrong'] < 0.1
    assert rewards['reveals'] < -0.9  # right, and punished for the leak
    assert 'asked again: 0.0' in printed[8]
