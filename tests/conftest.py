"""Shared fixtures; nothing here talks to a network."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('TFDS_DATA_DIR', '/tmp/exectune_jax_tests/tfds')
# Programs are compiled once for all tests and their child processes.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR',
                      '/tmp/exectune_jax_tests/xla')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
# Compiling is what most time goes into: XLA leaves out what makes programs
# fast. Where tests ask what users get (test_fit, make test-full), it does not.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
for name in ('OPENAI_API_KEY', 'GEMINI_API_KEY', 'GOOGLE_API_KEY'):
  os.environ.pop(name, None)

import pytest  # noqa: E402

from exectune_jax import config as config_lib  # noqa: E402
from exectune_jax import interrupt  # noqa: E402

SHARED = pathlib.Path(__file__).parents[2] / 'shared'


@pytest.fixture(autouse=True)
def _no_pending_interrupt():
  interrupt._seen.clear()
  yield
  interrupt._seen.clear()


@pytest.fixture
def config():
  """The default config, small, with fast retries."""
  config = config_lib.runlocal(config_lib.default_config())
  config.compilation_cache = ''
  config.core.deadline_s = 20.0
  return config


@pytest.fixture(scope='session')
def shared():
  """Real upstream data where a developer has it; else the test skips."""
  if not (SHARED / 'data').is_dir():
    pytest.skip('needs the upstream data files')
  return SHARED
