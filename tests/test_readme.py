"""README's code and commands are the ones that work."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_the_task_class_of_the_readme_runs(tmp_path):
  (source,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  (tmp_path / 'my_task.py').write_text(source)
  done = subprocess.run(
      [sys.executable, '-m', 'exectune_jax.main',
       '--config=configs/quickstart.py', f'--workdir={tmp_path / "w"}',
       '--config.task.name=my_task:Reverse', '--config.stages=evaluate',
       "--config.evaluate.systems=('core_alone', 'generic')"],
      cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(tmp_path)}, text=True,
      capture_output=True)
  assert done.returncode == 0, done.stderr
  assert 'my_task:Reverse, core toy:small, 2 held-out problems' in done.stdout
  assert len(source.splitlines()) < 30


def test_paths_and_fields_that_are_named_exist():
  from exectune_jax import config as config_lib
  for path in re.findall(
      r'`?((?:configs|launch|colabs|exectune_jax)/[\w./]+\w)', README):
    assert 'NAME' in path or (ROOT / path).exists(), path
  config = config_lib.default_config()
  for field in re.findall(r'--config\.([\w.]+\w)=', README):
    config_lib.read(config, field)
  for stage in re.findall(r'^\| `([\w:]+)` \|', README, re.MULTILINE):
    config_lib.variant(config, stage)
  targets = re.findall(r'^(\w[\w-]*):', (ROOT / 'Makefile').read_text(),
                       re.MULTILINE)
  for target in re.findall(r'^    make ([\w-]+)', README, re.MULTILINE):
    assert target in targets
