"""Programs judged per second, in bubblewrap and in plain subprocesses.

  python -m benchmarks.sandbox --programs=100 --processes=2

HumanEval's shape: a short function and a few assertions, by the grader
processes that training uses. The peer is what most harnesses do, an
interpreter for each program that runs it together with its tests. Rounds
alternate.
"""

import argparse
import asyncio
import concurrent.futures
import json
import statistics
import subprocess
import sys
import time

from benchmarks import harness
from exectune_jax.config import default_config
from exectune_jax.episode import Problem, Tests
from exectune_jax.rewards.graders import Graders
from exectune_jax.tasks import make_task

PROGRAM = '''from typing import List

def below_zero(operations: List[int]) -> bool:
  balance = 0
  for change in operations:
    balance += change
    if balance < 0:
      return True
  return False
'''
TESTS = '''
assert below_zero([]) == False
assert below_zero([1, 2, -3, 1, 2, -3]) == False
assert below_zero([1, 2, -4, 5, 6]) == True
assert below_zero([1, -1, 2, -2, 5, -5, 4, -4]) == False
'''


async def _sandboxed(graders, programs: int) -> float:
  problem = Problem('p', 'q', PROGRAM, tests=Tests(TESTS, 'below_zero'))
  began = time.perf_counter()
  verdicts = await asyncio.gather(*[
      graders.verify(problem, f'```python\n{PROGRAM}# {i}\n```')
      for i in range(programs)])
  seconds = time.perf_counter() - began
  assert all(v.correct for v in verdicts)
  return programs / seconds


def _plain(processes: int, programs: int) -> float:
  def one(i):
    subprocess.run([sys.executable, '-I', '-c', f'{PROGRAM}{TESTS}# {i}'],
                   check=True)
  began = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(processes) as pool:
    list(pool.map(one, range(programs)))
  return programs / (time.perf_counter() - began)


async def _measure(args):
  options = default_config().task
  with options.unlocked():
    options.name = 'humaneval'
  make_task(options).check()
  graders = Graders(options, 0, args.processes)
  try:
    await _sandboxed(graders, 2 * args.processes)  # start the workers
    ours, plain = [], []
    for _ in range(args.rounds):
      ours.append(await _sandboxed(graders, args.programs))
      plain.append(_plain(args.processes, args.programs))
    return ours, plain
  finally:
    await graders.close()


def main():
  parser = argparse.ArgumentParser(prog='python -m benchmarks.sandbox')
  parser.add_argument('--programs', type=int, default=100)
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  ours, plain = asyncio.run(_measure(args))
  print(json.dumps({
      'benchmark': 'sandbox', 'machine': harness.machine(harness.cpu()),
      'processes': args.processes,
      'programs_per_s': round(statistics.median(ours), 1),
      'programs_per_s_range': [round(min(ours), 1), round(max(ours), 1)],
      'x_plain_subprocess': round(statistics.median(
          a / b for a, b in zip(ours, plain, strict=True)), 2)}))


if __name__ == '__main__':
  main()
