"""The command line, as a user types it."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def command(workdir, *args, config='configs/quickstart.py:runlocal'):
  return [sys.executable, '-m', 'exectune_jax.main', f'--config={config}',
          f'--workdir={workdir}', '--config.compilation_cache=', *args]


def run(*args, **kwargs):
  return subprocess.run(command(*args, **kwargs), cwd=ROOT, text=True,
                        capture_output=True, timeout=240)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'w'
  return run(workdir), workdir


def test_the_whole_recipe_leaves_its_report(finished):
  done, workdir = finished
  assert done.returncode == 0, done.stderr
  report = json.loads((workdir / 'report.json').read_text())
  assert report['n'] == 12 and report['task'] == 'word_problems'
  names = ['core_alone', 'generic', 'base', 'sft', 'advisor', 'exectune']
  assert [s['name'] for s in report['systems']] == names
  for s in report['systems']:
    low, high = s['ci95']
    assert 0 <= low <= s['accuracy'] <= high <= 1
    assert {'executability', 'malformed_rate', 'degraded_rate',
            'guide_tokens', 'core_tokens', 'usd_per_1k'} <= set(s)
  assert len(report['paired']) == 15
  assert {'a', 'b', 'difference', 'ci95', 'mcnemar_p'} == set(
      report['paired'][0])
  assert (workdir / 'frontier.png').read_bytes().startswith(b'\x89PNG')
  assert '<h2>Episodes</h2>' in (workdir / 'report.html').read_text()
  assert 'core_alone' in done.stdout and 'McNemar' in done.stdout
  for guide in names[2:]:
    assert (workdir / 'guides' / guide / 'metrics.jsonl').exists()
    assert list((workdir / 'guides' / guide).glob('events.out.tfevents*'))


def test_export_is_one_more_stage_of_a_finished_run(finished):
  _, workdir = finished
  done = run(workdir, '--config.stages=export')
  assert done.returncode == 0, done.stderr
  folder = workdir / 'export' / 'exectune'
  assert {'config.json', 'model.safetensors', 'tokenizer.json',
          'chat_template.jinja'} <= {p.name for p in folder.iterdir()}
  assert f'written: {folder}' in done.stdout


def test_a_second_start_compiles_nothing(tmp_path):
  """Another workdir, the same shapes: no program is new to the cache."""
  stages = '--config.stages=collect,sft:base'
  held = []
  for name in ('a', 'b'):
    done = run(tmp_path / name, stages,
               f'--config.compilation_cache={tmp_path / "cache"}')
    assert done.returncode == 0, done.stderr
    held.append({p.name for p in (tmp_path / 'cache').iterdir()
                 if p.name.endswith('-cache')})
  assert any(n.startswith('jit_step') for n in held[0])
  assert held[1] == held[0]


def test_running_it_again_costs_nothing_and_agrees(finished):
  _, workdir = finished
  before = (workdir / 'report.json').read_text()
  again = run(workdir)
  assert again.returncode == 0
  assert 'done before' in again.stdout
  assert (workdir / 'report.json').read_text() == before


BAD = [
    (['--config.rl.setps=3'], 2, 'setps'),
    (['--config.rl.steps=many'], 2, 'many'),
    (['--config.rl.steps=0'], 1, 'rl.steps=0'),
    (['stray'], 2, "unexpected argument 'stray'"),
    (['--no_such_flag=1'], 2, 'no_such_flag'),
    (['--config.stages=dance'], 1, "unknown stage 'dance'"),
    (['--config.stages=rl'], 1, "rl.init='sft'"),
    (['--config.stages=sft'], 1, 'run the stage collect first'),
    (['--config.task.name=gsm8k', '--config.task.data_dir=/nowhere'], 1,
     "task.data_dir='/nowhere'"),
    (['--config.task.name=jsonl', '--config.task.data_dir=/nowhere'], 1,
     "task.data_dir='/nowhere'"),
    (['--config.task.test_size=0', '--config.stages=evaluate',
      "--config.evaluate.systems=('core_alone',)"], 1, "split 'test' is empty"),
    (['--config.core.name=openai:m@http://127.0.0.1:9/v1',
      '--config.core.usd_per_1m_input=0.1', '--config.core.attempts=1',
      '--config.core.usd_per_1m_output=0.1'], 1,
     'cannot connect to http://127.0.0.1:9/v1; start the server'),
    (['--config.core.name=gemini:gemini-2.5-flash'], 1, 'GEMINI_API_KEY'),
    (['--config.core.name=openai:m@http://127.0.0.1:9/v1'], 1,
     'no price is known'),
    (['--config.guide.size=huge', '--config.stages=collect,sft:base'], 1,
     "guide.size='huge'"),
    (['--config.budget_usd=0.000001'], 1, 'budget_usd=1e-06'),
]


@pytest.mark.parametrize('args, code, message', BAD,
                         ids=[' '.join(a) for a, _, _ in BAD])
def test_bad_input_is_one_line(tmp_path, args, code, message):
  done = run(tmp_path / 'w', *args)
  assert done.returncode == code, done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: ') and message in last
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('config, message', [
    ('configs/nowhere.py', 'nowhere.py'),
    ('configs/quickstart.py:fast', "config argument 'fast'")])
def test_bad_config_file(tmp_path, config, message):
  done = run(tmp_path / 'w', config=config)
  assert done.returncode == 2
  assert message in done.stderr.strip().splitlines()[-1]
  assert 'Traceback' not in done.stderr


def test_no_flags_and_unwritable_workdir(tmp_path):
  done = subprocess.run([sys.executable, '-m', 'exectune_jax.main'], cwd=ROOT,
                        text=True, capture_output=True)
  assert done.returncode == 2
  assert '--config and --workdir are required' in done.stderr
  (tmp_path / 'file').write_text('')
  done = run(tmp_path / 'file' / 'w')
  assert done.returncode == 1 and '--workdir=' in done.stderr


@pytest.mark.parametrize('stage', ['collect', 'evaluate'])
def test_ctrl_c_is_one_line_and_continues(tmp_path, stage):
  workdir = tmp_path / 'w'
  args = ['--config.core.name=toy:small?latency_s=0.5',
          '--config.core.concurrency=1', f'--config.stages={stage}',
          "--config.evaluate.systems=('core_alone',)"]
  child = subprocess.Popen(command(workdir, *args), cwd=ROOT, text=True,
                           stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
  ledger = workdir / 'ledger.sqlite'
  while not ledger.exists() and child.poll() is None:
    time.sleep(0.05)
  time.sleep(1.5)
  child.send_signal(signal.SIGINT)
  error = child.communicate(timeout=60)[1]
  assert child.returncode == 1
  assert 'the same command continues' in error.strip().splitlines()[-1]
  assert 'Traceback' not in error
  args[0] = '--config.core.name=toy:small?latency_s=0.5'
  args[1] = '--config.core.concurrency=16'
  done = run(workdir, *args)
  assert done.returncode == 0, done.stderr
