"""What a guide adds to a core's own latency, over HTTP.

  python -m benchmarks.serve

A core with OpenAI's wire format and a fixed latency is asked by closed-loop
clients in three ways, in alternating rounds: directly; through the endpoint
without the guide; through the endpoint with a tiny guide that was trained for
it. No question comes twice. Latencies are of whole requests.

  requests_per_s, p50_ms, p99_ms   with the guide, --clients at a time
  added_p50_ms                     against asking the core directly
  added_p50_ms_unloaded            the same with one client
  guided                           share of answers with a strategy
"""

import argparse
import asyncio
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import aiohttp

from benchmarks import fake_core, harness

MAIN = [sys.executable, '-m', 'exectune_jax.main',
        '--config=configs/quickstart.py']


def _guide(folder: pathlib.Path, steps: int) -> pathlib.Path:
  """A guide that writes strategies, as a Hugging Face directory."""
  subprocess.run(
      [*MAIN, f'--workdir={folder}', '--config.stages=collect,sft:base,export',
       '--config.collect.problems=600', '--config.sft.batch_size=16',
       f'--config.sft.base_steps={steps}', '--config.sft.learning_rate=3e-3',
       '--config.export.guide=base'], check=True, stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL)
  return folder / 'export/base'


def _start(folder, checkpoint, core_url, slots):
  """(process, address) of the endpoint."""
  process = subprocess.Popen(
      [*MAIN, f'--workdir={folder}', '--config.stages=serve',
       '--config.guide.size=hf', f'--config.guide.checkpoint={checkpoint}',
       '--config.serve.guide=', '--config.serve.port=0',
       f'--config.serve.slots={slots}', '--config.serve.max_requests=4096',
       '--config.core.concurrency=1024', '--config.core.min_concurrency=1024',
       f'--config.core.name=openai:m@{core_url}/v1',
       '--config.core.usd_per_1m_input=1.0',
       '--config.core.usd_per_1m_output=1.0'],
      text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  for line in process.stdout:
    if line.startswith('serving'):
      return process, line.split(' on ')[1].strip()
  raise SystemExit('error: the endpoint did not start')


def _questions():
  """Word problems without end, each one once."""
  for a, b, c in itertools.product(range(2, 100), repeat=3):
    yield (f'A shop has {a} boxes with {b} pens in each. Then it finds {c} '
           'more pens. How many pens does it have?')


async def _load(url, model, clients, seconds, questions) -> dict:
  """Closed loop: each client asks again as soon as it has its answer."""
  latencies, guided = [], []
  ends = time.monotonic() + seconds

  async def client(session):
    while time.monotonic() < ends:
      began = time.monotonic()
      async with session.post(f'{url}/chat/completions', json={
          'model': model, 'messages': [
              {'role': 'user', 'content': next(questions)}]}) as response:
        data = await response.json()
        if response.status != 200:
          raise SystemExit(f'error: HTTP {response.status}: {data}')
      latencies.append(time.monotonic() - began)
      guided.append(bool(data.get('exectune', {}).get('guided')))

  began = time.monotonic()
  async with aiohttp.ClientSession(
      connector=aiohttp.TCPConnector(limit=0)) as session:
    await asyncio.gather(*[client(session) for _ in range(clients)])
  took = time.monotonic() - began
  cuts = statistics.quantiles(latencies, n=100, method='inclusive')
  return {'requests_per_s': len(latencies) / took, 'p50_ms': 1000 * cuts[49],
          'p99_ms': 1000 * cuts[98], 'guided': statistics.fmean(guided)}


def _median(rounds: list[dict]) -> dict:
  return {k: round(statistics.median(r[k] for r in rounds), 3)
          for k in rounds[0]}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--clients', type=int, default=32)
  parser.add_argument('--slots', type=int, default=16)
  parser.add_argument('--latency_s', type=float, default=0.5)
  parser.add_argument('--seconds', type=float, default=10.0)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=150)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    checkpoint = _guide(folder / 'trained', args.steps)
    core, core_url = fake_core.start(args.latency_s)
    endpoint = None
    try:
      endpoint, url = _start(folder / 'served', checkpoint, core_url,
                             args.slots)
      ways = {'direct': (f'{core_url}/v1', 'm'), 'guided': (url, 'exectune'),
              'alone': (url, 'openai:m')}
      questions, rounds = _questions(), {}
      for clients in (args.clients, 1):
        for _ in range(args.rounds):
          for name, (where, model) in ways.items():
            rounds.setdefault((name, clients), []).append(asyncio.run(_load(
                where, model, clients, args.seconds, questions)))
    finally:
      core.terminate()
      if endpoint:
        endpoint.terminate()
        endpoint.wait()
  found = {key: _median(r) for key, r in rounds.items()}
  many = args.clients
  print(json.dumps({
      **found['guided', many],
      'added_p50_ms': round(found['guided', many]['p50_ms']
                            - found['direct', many]['p50_ms'], 3),
      'added_p50_ms_unloaded': round(found['guided', 1]['p50_ms']
                                     - found['direct', 1]['p50_ms'], 3),
      'direct': found['direct', many], 'alone': found['alone', many],
      'clients': many, 'slots': args.slots, 'latency_s': args.latency_s,
      'machine': harness.machine(harness.cpu())}))


if __name__ == '__main__':
  main()
