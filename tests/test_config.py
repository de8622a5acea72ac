import importlib
import json
import pathlib

import pytest

from exectune_jax import config as config_lib
from exectune_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py')
                 if p.stem != '__init__')


def test_unknown_fields_cannot_be_set():
  config = config_lib.default_config()
  with pytest.raises(AttributeError, match='setps'):
    config.rl.setps = 3
  with config.rl.unlocked():
    config.rl.setps = 3
  with pytest.raises(UserError, match='rl.setps: unknown config field'):
    config_lib.validate(config)


@pytest.mark.parametrize('field, value', [
    ('rl.steps', 0), ('rl.group_size', 1), ('rl.temperature', -1.0),
    ('rl.reward', 'best'), ('rl.advantage', 'rank'), ('rl.max_staleness', -1),
    ('rl.micro_batch', 7), ('sft.micro_batch', 5), ('sft.data', 'all'),
    ('guide.compute_dtype', 'int8'), ('core.concurrency', 0),
    ('teacher.concurrency', 0), ('task.test_size', -1),
    ('collect.max_revisions', -1),
    ('core.temperature', 0.5), ('evaluate.batch_size', 0)])
def test_values_that_cannot_work_name_the_field(field, value):
  config = config_lib.default_config()
  section, _, leaf = field.rpartition('.')
  config_lib.read(config, section)[leaf] = value
  named = 'core.samples_alone' if field == 'core.temperature' else field
  with pytest.raises(UserError, match=f'^{named}='):
    config_lib.validate(config)


def test_stages_and_variants():
  config = config_lib.default_config()
  config.stages = 'collect,train'
  with pytest.raises(UserError, match="unknown stage 'train'"):
    config_lib.validate(config)
  name, staged = config_lib.variant(config, 'sft:base')
  assert name == 'sft'
  assert (staged.sft.data, staged.sft.init, staged.sft.output,
          staged.sft.steps) == ('proposed', '', 'base', config.sft.base_steps)
  name, staged = config_lib.variant(config, 'rl:advisor')
  assert (staged.rl.reward, staged.rl.init, staged.rl.output) == (
      'advisor', 'base', 'advisor')
  # the baseline is fair: nothing else differs
  staged.rl.update(reward='exectune', init='sft', output='exectune')
  assert staged.to_json() == config.to_json()


def test_argument_strings():
  spec = dict(runlocal=False, group=8, core='toy:small', rate=0.5)
  parsed = config_lib.parse_arg('runlocal,group=4,core=openai:m@http://x:1',
                                **spec)
  assert (parsed.runlocal, parsed.group, parsed.core, parsed.rate) == (
      True, 4, 'openai:m@http://x:1', 0.5)
  for bad in ('grp=4', 'group=x', 'group'):
    with pytest.raises(UserError, match=f"config argument '{bad}'"):
      config_lib.parse_arg(bad, **spec)


def test_a_workdir_belongs_to_one_run(tmp_path):
  config = config_lib.default_config()
  config_lib.remember(config, tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 0
  config.stages, config.budget_usd = 'evaluate', 5.0  # may change
  config.evaluate.show_episodes = 1
  config_lib.remember(config, tmp_path)
  config.task.seed = 3  # no results yet: any config may take over
  config_lib.remember(config, tmp_path)
  (tmp_path / 'guides').mkdir()
  config.rl.group_size = 4
  with pytest.raises(UserError, match='rl.group_size=4: .* with 8'):
    config_lib.remember(config, tmp_path)
  (tmp_path / 'config.json').write_text('{"seed": ')
  with pytest.raises(UserError, match='config.json: damaged'):
    config_lib.remember(config, tmp_path)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_valid(name):
  module = importlib.import_module(f'configs.{name}')
  config_lib.validate(module.get_config())
  small = module.get_config('runlocal')
  config_lib.validate(small)
  assert small.rl.steps == small.sft.steps == 2
  assert f'configs/{name}.py' in module.__doc__  # its own command
