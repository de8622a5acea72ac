"""Guides that were trained here, loaded elsewhere."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from exectune_jax import config as config_lib
from exectune_jax.episode import Problem
from exectune_jax.errors import UserError
from exectune_jax.learning import sharding
from exectune_jax.learning.learner import Learner
from exectune_jax.models import hf
from exectune_jax.models.transformer import Transformer, init_variables
from exectune_jax.report import card
from exectune_jax.stages import collect, export, sft


def trained(workdir, lora_rank, **changes):
  """A guide after three supervised steps, and its export."""
  config = config_lib.runlocal(config_lib.default_config())
  config.compilation_cache = ''
  config.guide.update(lora_rank=lora_rank, lora_targets='q|up|down')
  config.export.update(guide='base', **changes)
  config.sft.learning_rate = 0.01
  config.sft.base_steps = 3
  workdir.mkdir()
  collect.run(config, workdir)
  sft.run(config_lib.variant(config, 'sft:base')[1], workdir)
  export.run(config, workdir)
  return config, Learner(config, workdir, config.rl)


@pytest.mark.parametrize('lora_rank', [0, 4])
def test_exported_guides_give_the_same_logits(tmp_path, lora_rank):
  config, learner = trained(tmp_path / 'w', lora_rank)
  variables = learner.weights('base', 'export.guide')
  assert ('lora' in variables) == bool(lora_rank)
  guide, folder = learner.guide, tmp_path / 'w/export/base'
  tokens = np.array([guide.tokenizer.encode(
      'Problem: Ada has 3 apples and buys 4 more.')])

  def logits(model, variables):
    hidden, _ = model.apply(variables, jnp.asarray(tokens))
    return model.apply(variables, hidden, method='logits')

  ours = np.asarray(jax.jit(lambda v: logits(guide.model, v))(variables))
  # adapters must have moved what they adapt
  first = jax.jit(lambda v: logits(guide.model, v))(learner.first)
  assert np.abs(ours - np.asarray(first)).max() > 0.01
  # read back by ourselves, as a plain model
  plain = Transformer(hf.read_config(folder))
  shapes = jax.eval_shape(
      lambda: init_variables(plain, jax.random.key(0)))['params']
  params = hf.read_params(folder, plain.config, shapes,
                          sharding.shardings(shapes, learner.mesh))
  again = jax.jit(lambda v: logits(plain, v))({'params': params})
  np.testing.assert_allclose(again, ours, atol=1e-5)
  # and by transformers
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM, AutoTokenizer
  theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  with torch.no_grad():
    found = theirs(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(found, ours, atol=1e-4)
  words = AutoTokenizer.from_pretrained(folder)
  assert words.encode('12 apples') == guide.tokenizer.encode('12 apples')
  assert words.chat_template == guide.tokenizer.chat_template
  assert theirs.config.eos_token_id == guide.end
  # Its own settings decode greedily to the same strategy as our sampler.
  problem = Problem('p', 'Ada has 3 apples and buys 4 more.', '7')
  prompt = guide.prompt(problem)
  (ours,) = learner.sampler.sample(variables, [prompt], [0], 1, seed=0,
                                   temperature=0.0)
  with torch.no_grad():
    written = theirs.generate(torch.tensor([prompt]))[0, len(prompt):].tolist()
  assert theirs.generation_config.max_new_tokens == guide.max_new_tokens
  assert written[:len(ours.tokens)] == list(ours.tokens)


REPORT = {
    'task': 'word_problems', 'core': 'toy:small', 'n': 300, 'systems': [
        {'name': 'core_alone', 'accuracy': 0.267, 'ci95': [0.22, 0.319],
         'degraded_rate': 0.0, 'degraded_ci95': [0.0, 0.013],
         'usd_per_1k': 0.0096},
        {'name': 'base', 'accuracy': 0.65, 'ci95': [0.594, 0.702],
         'degraded_rate': 0.023, 'degraded_ci95': [0.011, 0.048],
         'usd_per_1k': 0.0123}],
    'paired': [{'a': 'base', 'b': 'core_alone', 'difference': 0.383,
                'ci95': [0.32, 0.446], 'mcnemar_p': 1e-9}]}


def test_the_model_card_has_the_reports_numbers(tmp_path):
  config, _ = trained(tmp_path / 'w', 0)
  path = tmp_path / 'w/export/base/README.md'
  assert 'This guide has not been evaluated.' in path.read_text()
  (tmp_path / 'w/report.json').write_text(json.dumps(REPORT))
  export.run(config, tmp_path / 'w')
  text = path.read_text()
  assert '| core_alone | 26.7 (22.0-31.9) | 0.0 (0.0-1.3) | 0.0096 |' in text
  assert '| base | 65.0 (59.4-70.2) | 2.3 (1.1-4.8) | 0.0123 |' in text
  assert 'Paired difference: +38.3 points [+32.0, +44.6].' in text
  front = yaml.safe_load(text.split('---')[1])
  assert front == {'library_name': 'transformers', 'tags': [
      'exectune', 'guide'], 'pipeline_tag': 'text-generation'}
  named = card.write('base', config, 'Qwen/Qwen3-1.7B', None)
  assert yaml.safe_load(named.split('---')[1])[
      'base_model'] == 'Qwen/Qwen3-1.7B'


def test_the_code_of_the_model_card_runs(tmp_path):
  pytest.importorskip('torch')
  trained(tmp_path / 'w', 0)
  folder = tmp_path / 'w/export/base'
  (code,) = re.findall('```python\n(.*?)```',
                       (folder / 'README.md').read_text(), re.DOTALL)
  scope = {'PATH': str(folder), 'question': 'Ada has 3 apples.'}
  exec(code, scope)
  assert isinstance(scope['strategy'], str) and scope['strategy']


def test_an_exported_guide_can_be_trained_on(tmp_path):
  """Out and in again, now with adapters, by guide.size='hf'."""
  _, learner = trained(tmp_path / 'w', 0)
  config = config_lib.runlocal(config_lib.default_config())
  config.guide.update(size='hf', checkpoint=str(tmp_path / 'w/export/base'),
                      lora_rank=2)
  again = Learner(config, tmp_path / 'again', config.rl)
  before, after = learner.weights('base', ''), again.first
  assert sorted(after) == ['lora', 'params']
  jax.tree.map(np.testing.assert_array_equal, before['params'],
               after['params'])
  assert all(np.any(x['a']) and not np.any(x['b'])
             for x in after['lora']['blocks'].values())
  config.guide.size = 'smollm2_135m'
  with pytest.raises(UserError, match='vocab=1026, but guide.size says'):
    Learner(config, tmp_path / 'again', config.rl)


def test_adapters_that_are_kept_give_the_same_logits_in_peft(tmp_path):
  _, base = trained(tmp_path / 'base', 0)
  config = config_lib.runlocal(config_lib.default_config())
  config.compilation_cache = ''
  config.guide.update(size='hf', lora_rank=4, lora_targets='q|v|up|down',
                      checkpoint=str(tmp_path / 'base/export/base'))
  config.export.update(guide='base', lora='keep')
  config.sft.update(learning_rate=0.01, base_steps=3)
  workdir = tmp_path / 'w'
  workdir.mkdir()
  collect.run(config, workdir)
  sft.run(config_lib.variant(config, 'sft:base')[1], workdir)
  export.run(config, workdir)
  learner, folder = Learner(config, workdir, config.rl), workdir / 'export/base'
  variables = learner.weights('base', '')
  tokens = np.array([learner.guide.tokenizer.encode('Ada has 3 apples.')])
  def logits(v):
    hidden, _ = learner.guide.model.apply(v, jnp.asarray(tokens))
    return learner.guide.model.apply(v, hidden, method='logits')
  ours = np.asarray(jax.jit(logits)(variables))
  plain = np.asarray(jax.jit(logits)(learner.first))
  assert np.abs(ours - plain).max() > 0.01
  size = sum(f.stat().st_size for f in folder.glob('*.safetensors'))
  assert size < (tmp_path / 'base/export/base/model.safetensors'
                 ).stat().st_size / 10
  assert 'from peft import AutoPeftModelForCausalLM' in (
      folder / 'README.md').read_text()
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  theirs = peft.AutoPeftModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32)
  with torch.no_grad():
    found = theirs(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(found, ours, atol=1e-4)


@pytest.mark.parametrize('rank, said', [(0, 'has no adapters'), (
    2, 'began from random weights')])
def test_adapters_that_cannot_be_kept(tmp_path, rank, said):
  with pytest.raises(UserError, match=said):
    trained(tmp_path / 'w', rank, lora='keep')


def test_only_adapters_are_saved(tmp_path):
  _, learner = trained(tmp_path / 'w', 2)
  step = next((tmp_path / 'w/guides/base').glob('*/params'))
  held = sum(f.stat().st_size for f in step.rglob('*') if f.is_file())
  weights = sum(x.size * 4 for x in jax.tree.leaves(
      learner.variables['params']))
  assert held < weights / 10


def test_export_dtype_and_unknown_guides(tmp_path):
  config, _ = trained(tmp_path / 'w', 0, dtype='bfloat16',
                      output=str(tmp_path / 'elsewhere'))
  from safetensors.numpy import load_file
  tensors = load_file(tmp_path / 'elsewhere/model.safetensors')
  assert {str(x.dtype) for x in tensors.values()} == {'bfloat16'}
  config.export.guide = 'nobody'
  with pytest.raises(UserError, match="export.guide='nobody'"):
    export.run(config, tmp_path / 'w')
