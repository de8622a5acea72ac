"""Times workers in alternating runs and prints one JSON line.

Every worker is a process of its own, so that peak memory is its own and no
thread pool disturbs another. It prepares and warms up, then does one timed
run for each line on its standard input. The first worker is ours; the others
are peers on the same weights and shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def main(name: str, workers: dict, options: dict, describe) -> None:
  """Runs a benchmark from its command line.

  Args:
    name: of the benchmark.
    workers: name -> function from parsed options to a function that does one
      run and returns when its result is there. The first is 'ours'.
    options: name -> default, made into flags.
    describe: from options to {'tokens', 'flops', 'bytes'} of one run: tokens
      produced or trained on, operations of the model, and bytes that must
      come from memory (0: not what bounds it).
  """
  parser = argparse.ArgumentParser(prog=f'python -m benchmarks.{name}')
  for option, default in options.items():
    parser.add_argument(f'--{option}', type=type(default), default=default)
  parser.add_argument('--checkpoint', default='',
                      help='Hugging Face directory; else random weights')
  parser.add_argument('--size', default='smollm2_135m')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--vs', default='', help='peers, comma-separated: '
                      + ', '.join(w for w in workers if w != 'ours'))
  parser.add_argument('--tunix_python', default=sys.executable,
                      help='python that has google-tunix (tunix_peer.py)')
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--worker', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    _serve(workers[args.worker], args)
    return
  unknown = set(filter(None, args.vs.split(','))) - set(workers)
  if unknown:
    parser.error(f'--vs {args.vs}: choose from '
                 f'{", ".join(w for w in workers if w != "ours")}')
  with tempfile.TemporaryDirectory() as folder:
    if not args.checkpoint:
      args.checkpoint = folder
      subprocess.run([sys.executable, '-m', 'benchmarks.weights', folder,
                      args.size], check=True)
    print(json.dumps(_measure(name, args, describe(args))))


def _measure(name, args, work) -> dict:
  peers = list(filter(None, args.vs.split(',')))
  running = {worker: _Worker(name, worker, args)
             for worker in ['ours', *peers]}
  runs = {worker: [] for worker in running}
  for _ in range(args.pairs):
    for worker, process in running.items():
      runs[worker].append(process.run())
  ends = {worker: process.close() for worker, process in running.items()}
  seconds = {worker: [run['seconds'] for run in found]
             for worker, found in runs.items()}
  return {
      'benchmark': name, 'machine': machine(ends['ours']['device']),
      'settings': {k: v for k, v in vars(args).items()
                   if k not in ('worker', 'vs', 'checkpoint',
                                'tunix_python')},
      'tokens_per_s': round(
          work['tokens'] / statistics.median(seconds['ours']), 1),
      **_fraction(work, runs['ours']),
      'peak_bytes': ends['ours']['peak_bytes'],
      'ratio': {peer: round(statistics.median(
          theirs / ours for ours, theirs in zip(
              seconds['ours'], seconds[peer], strict=True)), 3)
          for peer in peers},
      'seconds': {k: [round(s, 3) for s in v] for k, v in seconds.items()},
      'peer_peak_bytes': {p: ends[p]['peak_bytes'] for p in peers}}


def _fraction(work, runs) -> dict:
  """mfu, or bandwidth_fraction for what memory bounds."""
  bound, rate, name = (
      ('bytes', 'bandwidth', 'bandwidth_fraction')
      if work['bytes'] and runs[0]['bandwidth'] else ('flops', 'peak', 'mfu'))
  return {name: round(statistics.median(
      work[bound] / run['seconds'] / run[rate] for run in runs), 3)}


def machine(device: str) -> str:
  return f'{device}, {os.cpu_count()} cores, {platform.platform()}'


class _Worker:
  """A worker process, warmed up."""

  def __init__(self, name, worker, args):
    flags = [f'--{k}={v}' for k, v in vars(args).items()
             if k not in ('worker', 'vs', 'pairs')]
    python = args.tunix_python if worker == 'tunix' else sys.executable
    self.process = subprocess.Popen(
        [python, '-m', f'benchmarks.{name}', '--worker', worker,
         *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=pathlib.Path(__file__).parents[1])
    print(f'{worker}: warming up', file=sys.stderr)
    self._read()

  def run(self) -> dict:
    self.process.stdin.write('run\n')
    self.process.stdin.flush()
    return self._read()

  def close(self) -> dict:
    self.process.stdin.close()
    end = self._read()
    self.process.wait()
    return end

  def _read(self) -> dict:
    for line in self.process.stdout:
      if line.startswith('BENCH '):
        return json.loads(line[6:])
    raise SystemExit(f'error: a worker ended with {self.process.wait()}; its '
                     'message is above')


def _serve(prepare, args) -> None:
  """The worker's side."""
  run = prepare(args)
  run()
  _say({})
  for _ in sys.stdin:
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    # A shared machine's speed drifts: each run is held against the peak of
    # its own moment.
    _say({'seconds': seconds, **_rates()})
  _say(_device())


def _say(values) -> None:
  print('BENCH ' + json.dumps(values), flush=True)


# Dense bfloat16 operations and bytes a second, by the vendor's data sheets.
ACCELERATORS = {'H100': (989e12, 3.35e12), 'H200': (989e12, 4.8e12),
                'A100': (312e12, 2.04e12)}


def _rates() -> dict:
  """Peak operations and bytes a second of what this worker runs on."""
  if 'jax' not in sys.modules:
    return {}
  import jax
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return {'peak': _matmul_rate(), 'bandwidth': 0.0}
  known = next((v for k, v in ACCELERATORS.items()
                if k in device.device_kind), (float('nan'), float('nan')))
  return {'peak': known[0], 'bandwidth': known[1]}


def _device() -> dict:
  """Name and peak memory of what this worker ran on."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  if 'jax' not in sys.modules:
    return {'peak_bytes': peak}
  import jax
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return {'peak_bytes': peak, 'device': cpu()}
  return {'peak_bytes': device.memory_stats()['peak_bytes_in_use'],
          'device': device.device_kind}


def cpu() -> str:
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  return next((x.partition(':')[2].strip() for x in lines
               if x.startswith('model name')), platform.processor())


def _matmul_rate() -> float:
  """Operations a second of a large float32 product: a CPU's usable peak."""
  import jax
  import jax.numpy as jnp
  x = jnp.ones((2048, 2048))
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  times = []
  for _ in range(5):
    began = time.perf_counter()
    product(x).block_until_ready()
    times.append(time.perf_counter() - began)
  return 2 * 2048 ** 3 / min(times)
