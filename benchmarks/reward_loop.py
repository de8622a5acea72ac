"""How well core calls, grading, sampling and updates overlap.

  python -m benchmarks.reward_loop

Runs the RL stage on the toy core with lognormal latencies (median 2 s, 99th
percentile 15 s; 8 groups of 8) strictly synchronously and with several
batches in flight, and asks an OpenAI-compatible server without latency as
fast as one process can, ledger on.

  step_over_bound      seconds of a step against max(sampling + update, core
                       critical path); several batches in flight go below 1
  step_over_in_flight  the same with the critical path shared by all batches
                       in flight, which nothing can go below
  speedup_vs_sync      against rl.max_staleness=0
  idle_fraction        of the step, the accelerator's
  accelerator_bound    the same where the core takes a twentieth of the time:
                       a step against sampling + update, and the idle share
  calls_per_s          through the whole client
"""

import argparse
import asyncio
import json
import math
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import fake_core, harness
from exectune_jax import config as config_lib
from exectune_jax.cores.base import CoreRequest, Price
from exectune_jax.cores.client import CoreClient
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores.service import make_core

Z99 = 2.326  # standard deviations of the 99th percentile


def _train(workdir, *fields):
  subprocess.run(
      [sys.executable, '-m', 'exectune_jax.main',
       '--config=configs/quickstart.py', f'--workdir={workdir}',
       *(f'--config.{field}' for field in fields)],
      check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _rl(prepared, folder, args, steps, staleness, median, p99) -> list[dict]:
  """Metrics of an RL run that begins from the prepared guide."""
  workdir = pathlib.Path(folder) / f'rl_{staleness}_{median:g}'
  shutil.copytree(prepared, workdir)
  (workdir / 'config.json').unlink()  # another core: another run
  spread = math.log(p99 / median) / Z99
  _train(workdir, 'stages=rl', 'rl.init=base', f'rl.steps={steps}',
         f'core.name=toy:small?latency_s={median}&spread={spread:.4f}',
         f'rl.groups={args.groups}', f'rl.group_size={args.group_size}',
         f'rl.max_staleness={staleness}', 'rl.checkpoint_every=1000',
         f'rl.deterministic={not staleness}', 'rl.show_every=0',
         'core.concurrency=1024', 'core.min_concurrency=1024')
  path = workdir / 'guides/exectune/metrics.jsonl'
  # The first steps compile and fill the pipeline; the last ones empty it.
  return [json.loads(line) for line in path.read_text().splitlines()][
      1 + staleness:steps - staleness]


def _mean(rows, name) -> float:
  return statistics.fmean(row[name] for row in rows)


def _idle(rows) -> float:
  return _mean(rows, 'seconds_waiting') / _mean(rows, 'seconds_step')


def _overlap(args, folder) -> dict:
  prepared = pathlib.Path(folder) / 'prepared'
  _train(prepared, 'stages=collect,sft:base', 'collect.problems=1000',
         'sft.base_steps=150')
  run = lambda *rest: _rl(prepared, folder, args, *rest)  # noqa: E731
  median, p99 = args.median_s, args.p99_s
  sync = run(args.steps, 0, median, p99)
  flying = run(2 * args.steps, args.staleness, median, p99)
  quick = run(2 * args.steps, args.staleness, median / 20, p99 / 20)
  alone = run(args.steps, 0, 1e-4, 1e-3)
  for row in (*sync, *flying, *quick, *alone):
    row['busy'] = row['seconds_step'] - row['seconds_waiting']
  step = _mean(flying, 'seconds_step')
  batches = args.staleness + 1
  def bound(share):
    return statistics.fmean(max(row['busy'], row['seconds_core'] / share)
                            for row in flying)
  return {
      'step_s': step, 'sync_step_s': _mean(sync, 'seconds_step'),
      'busy_s': _mean(flying, 'busy'),
      'core_critical_path_s': _mean(flying, 'seconds_core'),
      'step_over_bound': step / bound(1),
      'step_over_in_flight': step / bound(batches),
      'speedup_vs_sync': _mean(sync, 'seconds_step') / step,
      'idle_fraction': _idle(flying),
      'sync_idle_fraction': _idle(sync),
      'accelerator_bound': {
          'step_over_bound': _mean(quick, 'seconds_step') / _mean(alone,
                                                                  'busy'),
          'idle_fraction': _idle(quick)}}


async def _ask(url: str, calls: int, folder: str) -> float:
  settings = config_lib.core_section('x')
  settings.concurrency = 128
  ledger = Ledger(pathlib.Path(folder) / f'{time.monotonic_ns()}.sqlite')
  core = make_core(f'openai:m@{url}/v1', Price(1, 10))
  client = CoreClient(core, ledger, settings, 'benchmark')
  requests = [CoreRequest((('user', f'question {i} ' + 'word ' * 400),),
                          0.0, 64) for i in range(calls)]
  began = time.perf_counter()
  await asyncio.gather(*[client.call(r) for r in requests])
  seconds = time.perf_counter() - began
  await client.close()
  assert ledger.count() == calls
  ledger.close()
  return calls / seconds


def _throughput(args, folder) -> float:
  server, url = fake_core.start()
  try:
    return statistics.median(asyncio.run(_ask(url, args.calls, folder))
                             for _ in range(3))
  finally:
    server.kill()


def main():
  parser = argparse.ArgumentParser(prog='python -m benchmarks.reward_loop')
  parser.add_argument('--median_s', type=float, default=2.0)
  parser.add_argument('--p99_s', type=float, default=15.0)
  parser.add_argument('--groups', type=int, default=8)
  parser.add_argument('--group_size', type=int, default=8)
  parser.add_argument('--staleness', type=int, default=3)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--calls', type=int, default=8000)
  parser.add_argument('--only', default='', help='overlap or throughput')
  args = parser.parse_args()
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    if args.only != 'throughput':
      found |= _overlap(args, folder)
    if args.only != 'overlap':
      found['calls_per_s'] = _throughput(args, folder)
  print(json.dumps({
      'benchmark': 'reward_loop', 'machine': harness.machine(harness.cpu()),
      'settings': vars(args), **json.loads(
          json.dumps(found), parse_float=lambda x: round(float(x), 3))}))


if __name__ == '__main__':
  main()
