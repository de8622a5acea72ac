"""Every field of a run, with its default; configs/ changes what differs.

The returned ConfigDict is locked: a field that is not here cannot be set,
neither in a config file nor on the command line. `validate` checks values
before any work starts.
"""

from __future__ import annotations

import json
import pathlib

import ml_collections
from ml_collections.config_dict import placeholder

from exectune_jax import files
from exectune_jax.errors import UserError

# A stage may be followed by a variant, 'sft:base': the stage with these
# fields changed. This is how one run trains the guides that it compares.
VARIANTS = {
    'sft:base': {'sft.data': 'proposed', 'sft.init': '', 'sft.output': 'base',
                 'sft.steps': 'sft.base_steps',
                 'sft.examples': 'sft.base_examples'},
    'rl:advisor': {'rl.reward': 'advisor', 'rl.init': 'base',
                   'rl.output': 'advisor'},
}
STAGES = ('collect', 'sft', 'rl', 'evaluate', 'export', 'serve')

# Systems under test that have no guide of ours.
UNGUIDED = ('core_alone', 'large_core', 'generic', 'step_by_step')
CORES = ('core', 'teacher', 'judge', 'large_core')

# Fields that may differ when a workdir is used again.
RESUMABLE = ('stages', 'budget_usd', 'ledger', 'grader_processes',
             'compilation_cache', 'evaluate', 'export', 'serve', 'large_core',
             'sft.checkpoint_every', 'rl.checkpoint_every', 'rl.show_every',
             'rl.deadline_s', 'rl.max_lost_fraction', 'mesh.hosts',
             *(f'{core}.{field}' for core in CORES for field in (
                 'min_concurrency', 'concurrency', 'requests_per_minute',
                 'tokens_per_minute', 'attempts', 'timeout_s', 'deadline_s')))


def core_section(name: str) -> ml_collections.ConfigDict:
  """How to talk to one core; the target, the teacher and the judge are cores.

  Prices default to the provider's list price (cores/prices.py).
  """
  return ml_collections.ConfigDict(dict(
      name=name,  # 'provider:model' or 'provider:model@http://host:port/v1'
      temperature=0.0,
      max_tokens=512,  # of a reply, thoughts included
      thinking='',  # tokens (Gemini, Claude) or effort (GPT); '': its default
      stop=(),
      shots=0,  # worked examples in the prompt, the same for all systems
      samples_alone=1,  # draws behind "the core alone" (4 or more at T > 0)
      usd_per_1m_input=placeholder(float),
      usd_per_1m_output=placeholder(float),
      usd_per_1m_cached=placeholder(float),  # of input; None: as other input
      min_concurrency=1,  # calls at once adapt between these two
      concurrency=16,
      requests_per_minute=0,  # 0: no limit
      tokens_per_minute=0,  # in and out; 0: no limit
      attempts=5,
      timeout_s=60.0,  # one try
      deadline_s=300.0,  # all tries together
  ))


def default_config() -> ml_collections.ConfigDict:
  """All fields of all stages."""
  config = ml_collections.ConfigDict(dict(
      seed=0,
      stages='collect,sft:base,sft,rl:advisor,rl,evaluate',
      budget_usd=0.0,  # hard limit over all runs of the ledger; 0: none
      ledger='',  # that several runs share: file or, of buckets, directory
      run='',  # this run's name in the bill of a shared ledger
      grader_processes=2,  # that judge replies
      compilation_cache='~/.cache/exectune_jax/xla',  # '': off
      core=core_section('toy:small'),
      teacher=core_section('scripted'),
      judge=core_section(''),  # '': no judge
      large_core=core_section(''),  # evaluated alone, for comparison
  ))
  config.task = ml_collections.ConfigDict(dict(
      name='word_problems',  # a row of tasks/__init__.py, or 'module:Class'
      data_dir='',  # upstream's files, or your *.jsonl
      seed=0,
      train_size=2000,  # 0: all there are (not for word_problems)
      validation_size=100,
      test_size=300,
      max_number=20,  # svamp: 0 for no limit
      families=('one_step', 'units', 'two_step', 'three_step'),
      operations='+-*/',
      wordings=3,
      timeout_s=10.0,  # of a program and its tests
      memory_mb=1024,  # of a program
      unsafe_subprocess=False,  # True: programs run without isolation
  ))
  config.guide = ml_collections.ConfigDict(dict(
      size='tiny',  # a row of models/zoo.py, or 'hf': what checkpoint says
      checkpoint='',  # Hugging Face directory or model name; '': of the size
      max_prompt_tokens=128,
      max_new_tokens=64,
      compute_dtype='float32',  # or bfloat16; master weights are float32
      remat='none',  # recomputed backwards: 'full', all but products 'dots'
      attention='auto',  # or a key of models/attention.py's KERNELS
      int8_cache=False,  # keys and values in 8 bits while sampling
      lora_rank=0,  # 0: all weights are trained; else only adapters
      lora_alpha=16.0,
      lora_targets='.*',  # of q, k, v, o, gate, up, down
      usd_per_1m_tokens=0.02,  # what a guide token costs you to serve
  ))
  config.mesh = ml_collections.ConfigDict(dict(
      hosts=1,  # processes; 0: as many as Cloud TPU says (learning/hosts.py)
      mode='pjit',  # or 'pmap': data parallel only
      data=-1, fsdp=1, tensor=1,  # -1: all remaining devices
      gather_to_sample=True))  # weights whole on each device while sampling
  config.collect = ml_collections.ConfigDict(dict(
      problems=600,  # first so many of the train split
      max_revisions=2,
      styles=ml_collections.ConfigDict(dict(  # scripted teacher only
          steps=0.2, expression=0.25, named=0.2, verbal=0.2, wrong=0.1,
          reveals=0.05, loose=0.0)),
  ))
  config.optim = ml_collections.ConfigDict(dict(
      b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=1.0))
  config.sft = ml_collections.ConfigDict(dict(
      data='accepted',  # or 'proposed': whatever the teacher wrote
      init='base',  # guide to start from; '': config.guide as it is
      output='sft',
      examples=0,  # first so many; 0: all
      base_examples=0,  # the same for sft:base
      steps=100,
      base_steps=300,  # the same for sft:base
      batch_size=64,  # rows a step
      row_length=0,  # tokens of a row that holds many examples; 0: one a row
      micro_batch=0,  # rows at a time; 0: the whole batch
      learning_rate=1e-3,
      warmup_steps=20,
      checkpoint_every=200,
  ))
  config.rl = ml_collections.ConfigDict(dict(
      reward='exectune',  # or 'advisor': success only
      init='sft',
      output='exectune',
      steps=60,
      groups=16,  # problems a step
      group_size=8,  # strategies a problem
      micro_batch=0,  # problems at a time; 0: the whole batch
      share_prompt=True,  # a group's prompt is computed once, not per member
      learning_rate=2e-4,
      warmup_steps=5,
      temperature=1.0,
      advantage='centre',  # or 'std'
      baseline='group',  # or 'core_alone'
      clip_low=0.2,
      clip_high=0.28,
      kl=0.0,  # weight of KL(guide || initial guide)
      tis_cap=2.0,  # truncated importance sampling, trainer against sampler
      max_staleness=1,  # policy versions in flight; 0: strictly on-policy
      replace=0,  # times a group of equal rewards makes room for a new one
      deterministic=True,  # train groups in the order they were started
      deadline_s=600.0,  # for one group's rewards
      max_lost_fraction=0.5,  # of the last ten steps' episodes
      checkpoint_every=20,
      show_every=20,  # steps between printed episodes
  ))
  config.reward = ml_collections.ConfigDict(dict(
      exec=1.0, judge=0.0, leak=1.0, degrade=0.5, cost=0.05))
  config.evaluate = ml_collections.ConfigDict(dict(
      systems=('core_alone', 'generic', 'base', 'sft', 'advisor', 'exectune'),
      split='test',
      transfer='',  # a second task, never trained on, such as 'svamp'
      transfer_data_dir='',
      transfer_max_number=0,
      alpha_samples=2,  # strategies a problem behind executability, at T = 1
      top_k=0,  # truncate sampling to the k most likely tokens; 0: no
      top_p=1.0,  # or to those that together reach p
      batch_size=64,  # problems sampled at a time
      show_episodes=3,
  ))
  config.export = ml_collections.ConfigDict(dict(
      guide='exectune',  # which of guides/
      output='',  # directory; '': export/<guide> in the workdir
      dtype='',  # float32 or bfloat16; '': of the checkpoint it began from
      lora='merge',  # or 'keep': adapters alone, for peft
  ))
  config.serve = ml_collections.ConfigDict(dict(
      guide='exectune',  # which of guides/; '': guide.checkpoint as it is
      host='127.0.0.1',  # others need EXECTUNE_SERVE_TOKEN in the environment
      port=8400,  # 0: any that is free
      slots=16,  # problems for which the guide writes at a time
      deadline_s=2.0,  # for a strategy; then the core answers alone
      max_requests=256,  # being answered at a time; more are told to wait
      max_body_kb=256,
      drain_s=30,  # for running requests, after SIGTERM
  ))
  return config.lock()


def variant(config, stage: str):
  """(stage name, config with the fields of its variant applied)."""
  name = stage.partition(':')[0]
  if name not in STAGES or (':' in stage and stage not in VARIANTS):
    known = ', '.join((*STAGES, *VARIANTS))
    raise UserError(f"stages='{config.stages}': unknown stage '{stage}'; "
                    f'choose from {known}')
  config = config.copy_and_resolve_references()
  for field, value in VARIANTS.get(stage, {}).items():
    if isinstance(value, str) and value.startswith('sft.'):
      value = read(config, value)
    section, _, leaf = field.rpartition('.')
    read(config, section)[leaf] = value
  return name, config


def read(config, field: str):
  """The value at a dotted field name."""
  for part in field.split('.'):
    config = config[part]
  return config


def validate(config) -> None:
  """Raises UserError for the first field whose value cannot work."""
  _same_fields(config, default_config(), '')
  for stage in filter(None, config.stages.split(',')):
    variant(config, stage.strip())
  positive = [f'{core}.{field}' for core in CORES for field in (
      'min_concurrency', 'concurrency', 'attempts', 'max_tokens', 'timeout_s',
      'deadline_s', 'samples_alone')]
  positive += ('rl.steps rl.groups sft.steps sft.batch_size '
               'guide.max_new_tokens guide.max_prompt_tokens '
               'collect.problems rl.temperature rl.checkpoint_every '
               'evaluate.batch_size sft.checkpoint_every grader_processes '
               'task.timeout_s task.memory_mb rl.deadline_s rl.tis_cap '
               'optim.clip_norm serve.slots serve.deadline_s '
               'serve.max_requests serve.max_body_kb').split()
  for field in positive:
    if read(config, field) <= 0:
      raise UserError(f'{field}={read(config, field)}: must be positive')
  for field in ('collect.max_revisions core.shots task.train_size '
                'task.validation_size task.test_size sft.examples rl.kl '
                'sft.base_examples evaluate.alpha_samples budget_usd '
                'rl.max_staleness rl.replace mesh.hosts guide.lora_rank '
                'sft.row_length serve.port serve.drain_s').split() + [
                    f'{core}.{field}' for core in CORES for field in (
                        'requests_per_minute', 'tokens_per_minute')]:
    if read(config, field) < 0:
      raise UserError(f'{field}={read(config, field)}: must be 0 or more')
  if not sum(config.collect.styles.values()) > 0:
    raise UserError('collect.styles: at least one weight must be positive')
  if config.rl.advantage == 'std' and config.rl.baseline == 'core_alone':
    raise UserError("rl.advantage='std': goes with rl.baseline='group' only; "
                    'a group of equal rewards has no deviation to divide by')
  choices = {'rl.reward': ('exectune', 'advisor'), 'rl.advantage':
             ('centre', 'std'), 'rl.baseline': ('group', 'core_alone'),
             'sft.data': ('accepted', 'proposed'),
             'guide.compute_dtype': ('float32', 'bfloat16'),
             'guide.remat': ('none', 'dots', 'full'),
             'guide.attention': ('auto', 'xla', 'cudnn', 'splash'),
             'export.dtype': ('', 'float32', 'bfloat16'),
             'export.lora': ('merge', 'keep'),
             'mesh.mode': ('pjit', 'pmap')}
  for field, allowed in choices.items():
    if read(config, field) not in allowed:
      raise UserError(f"{field}='{read(config, field)}': choose from "
                      f'{", ".join(allowed)}')
  if config.rl.group_size < 2:
    raise UserError(f'rl.group_size={config.rl.group_size}: a group needs 2 '
                    'or more strategies to compare')
  for field in ('rl.micro_batch', 'sft.micro_batch'):
    stage, micro = field.split('.')[0], read(config, field)
    rows, name = ((config.rl.groups, 'rl.groups') if stage == 'rl'
                  else (config.sft.batch_size, 'sft.batch_size'))
    if micro and rows % micro:
      raise UserError(f'{field}={micro}: must divide {name}={rows}')
  if config.core.temperature > 0 and config.core.samples_alone < 2:
    raise UserError(f'core.samples_alone={config.core.samples_alone}: with '
                    f'core.temperature={config.core.temperature:g} the core '
                    'alone needs several draws; use 4 or more')


def _same_fields(config, schema, prefix):
  for key in config:
    if prefix == 'collect.' and key == 'styles':
      continue
    if key not in schema:
      raise UserError(f'{prefix}{key}: unknown config field; the fields are '
                      f'in exectune_jax/config.py')
    if isinstance(schema[key], ml_collections.ConfigDict):
      _same_fields(config[key], schema[key], f'{prefix}{key}.')
  missing = set(schema) - set(config)
  if missing:
    raise UserError(f'{prefix}{sorted(missing)[0]}: missing config field; '
                    'start from exectune_jax.config.default_config()')


def remember(config, workdir: pathlib.Path) -> None:
  """Writes config.json, or checks that the workdir is of the same run.

  As long as the workdir holds no results, any config may take it over.
  """
  path = workdir / 'config.json'
  now = json.loads(config.to_json())
  started = any((workdir / name).exists()
                for name in ('collect/summary.json', 'guides'))
  if not (started and path.exists()):
    files.write_whole(path, json.dumps(now, indent=2, sort_keys=True) + '\n')
    return
  try:
    before = json.loads(path.read_text())
  except ValueError as e:
    raise UserError(f'{path}: damaged: {e}; delete it if you know that the '
                    'config is the same') from e
  for field in sorted(set(_flat(before)) | set(_flat(now))):
    if any(field == r or field.startswith(r + '.') for r in RESUMABLE):
      continue
    old, new = _flat(before).get(field), _flat(now).get(field)
    if old != new:
      raise UserError(f'{field}={new!r}: {workdir} holds a run with {old!r}; '
                      'use another --workdir, or the old value to continue')


def _flat(tree: dict, prefix: str = '') -> dict:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat.update(_flat(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


def parse_arg(arg: str, **spec):
  """Reads a config's argument string, such as 'runlocal,group=16'.

  Args:
    arg: comma-separated key or key=value items.
    spec: the keys and their defaults, whose types the values get.

  Returns:
    A ConfigDict with every key of spec.
  """
  values = dict(spec)
  for item in filter(None, (arg or '').split(',')):
    key, given, value = item.partition('=')
    if key not in spec:
      raise UserError(f"config argument '{item}': choose from "
                      f'{", ".join(spec)}')
    kind = type(spec[key])
    try:
      values[key] = (value.lower() in ('', '1', 'true') if kind is bool
                     else kind(value))
    except ValueError as e:
      raise UserError(f"config argument '{item}': needs {kind.__name__}") from e
    if kind is not bool and not given:
      raise UserError(f"config argument '{item}': write {key}=value")
  return ml_collections.ConfigDict(values)


def runlocal(config):
  """Shrinks any config to a smoke run: seconds, offline, two steps each."""
  config.task.update(name='word_problems', train_size=60, validation_size=8,
                     test_size=12, families=('one_step', 'units'))
  for field, name in (('core', 'toy:small'), ('teacher', 'scripted'),
                      ('judge', ''), ('large_core', '')):
    config[field] = core_section(name)
  config.guide.update(size='tiny', checkpoint='', max_new_tokens=32,
                      max_prompt_tokens=64, compute_dtype='float32',
                      remat='none', attention='auto', lora_rank=0)
  config.mesh = default_config().mesh
  config.collect.problems = 30
  config.sft.update(steps=2, base_steps=2, batch_size=8, micro_batch=0,
                    row_length=0)
  config.rl.update(steps=2, groups=2, group_size=2, micro_batch=0)
  config.evaluate.update(
      batch_size=12, transfer='', alpha_samples=1,
      systems=tuple(s for s in config.evaluate.systems if s != 'large_core'))
  return config
