"""Rules about who may import what, read from the source."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'exectune_jax'
HOST = ['cores', 'rewards', 'tasks', 'report', 'episode.py', 'prompts.py',
        'strategy.py', 'teachers.py', 'errors.py', 'files.py', 'interrupt.py',
        'progress.py', 'config.py']
PURE = ['learning/steps.py', 'learning/losses.py', 'models/transformer.py']
OPTIONAL = {'torch', 'tensorflow', 'anthropic', 'openai', 'wandb', 'gguf',
            'xllamacpp'}


def sources(names=('.',)):
  for name in names:
    path = PACKAGE / name
    yield from [path] if path.suffix else sorted(path.rglob('*.py'))


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', list(sources(HOST)), ids=str)
def test_host_side_never_touches_an_accelerator(path):
  banned = ('jax', 'flax', 'optax', 'orbax', 'exectune_jax.learning',
            'exectune_jax.models', 'exectune_jax.sampling')
  for name in imports(path):
    assert not any(name == b or name.startswith(b + '.') for b in banned), name


def test_workers_and_cores_do_not_load_jax():
  code = ('import sys; import exectune_jax.cores.service, '
          'exectune_jax.rewards.collector, exectune_jax.tasks.word_problems, '
          'exectune_jax.rewards.grader_worker, exectune_jax.cores.gemini, '
          'exectune_jax.cores.openai, exectune_jax.report.page; '
          'sys.exit("jax" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('path', list(sources(PURE)), ids=str)
def test_device_code_does_no_io(path):
  assert not set(imports(path)) & {'os', 'pathlib', 'time', 'logging', 'io',
                                   'absl', 'json', 'random'}
  calls = {n.func.id for n in ast.walk(ast.parse(path.read_text()))
           if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
  assert not calls & {'print', 'open'}


def test_only_sharding_builds_meshes_and_specs():
  for path in sources():
    if path.name != 'sharding.py':
      names = set(imports(path))
      assert not any(n.startswith('jax.sharding') for n in names), path
      assert 'make_mesh(sizes' not in path.read_text()


def test_optional_backends_are_never_imported_at_the_top():
  for path in sources():
    top = {n for node in ast.parse(path.read_text()).body
           if isinstance(node, ast.Import | ast.ImportFrom)
           for n in ([a.name for a in node.names]
                     if isinstance(node, ast.Import) else [node.module])}
    assert not {n.split('.')[0] for n in top} & OPTIONAL, path


def test_no_drawers():
  names = {p.stem for p in sources()}
  assert not names & {'utils', 'util', 'common', 'helpers', 'misc'}
