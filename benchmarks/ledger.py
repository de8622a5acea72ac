"""Time of the ledger's look-ups and of whole calls when it is large.

  python -m benchmarks.ledger --entries=1000000

Keys that are there and keys that are not, in random order; a call is begin
and put, each a transaction of its own.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import tempfile
import time

from benchmarks import harness
from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.cores.ledger import Ledger


def _request(i: int) -> CoreRequest:
  return CoreRequest((('user', f'question {i} ' + 'word ' * 100),), 0.0, 512)


def _fill(ledger: Ledger, entries: int) -> None:
  reply = CoreReply('answer ' * 50, 'stop', 120, 60, 1e-4, 1.0)
  for start in range(0, entries, 10_000):  # not what is measured
    with ledger.transaction() as db:
      db.executemany(
          'INSERT INTO calls (key, core, stage, created, request, text, '
          'finish, input_tokens, output_tokens, usd, latency_s) '
          'VALUES (?,?,?,?,?,?,?,?,?,?,?)',
          [(_request(i).key('c'), 'c', 's', 0.0, json.dumps(
              _request(i).messages), reply.text, 'stop', 120, 60, 1e-4, 1.0)
           for i in range(start, min(start + 10_000, entries))])


def _milliseconds(work, arguments) -> list[float]:
  times = []
  for argument in arguments:
    began = time.perf_counter()
    work(argument)
    times.append(1e3 * (time.perf_counter() - began))
  return sorted(times)


def main():
  parser = argparse.ArgumentParser(prog='python -m benchmarks.ledger')
  parser.add_argument('--entries', type=int, default=1_000_000)
  args = parser.parse_args()
  rng = random.Random(0)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'ledger.sqlite'
    ledger = Ledger(path)
    _fill(ledger, args.entries)
    ledger.close()
    began = time.perf_counter()
    ledger = Ledger(path)
    opened = time.perf_counter() - began
    there = [_request(rng.randrange(args.entries)).key('c')
             for _ in range(5000)]
    absent = [_request(args.entries + i).key('c') for i in range(5000)]
    assert ledger.get(there[0]) and not ledger.get(absent[0])
    found = _milliseconds(ledger.get, there)
    missed = _milliseconds(ledger.get, absent)
    reply = CoreReply('answer ' * 50, 'stop', 120, 60, 1e-4, 1.0)
    def call(i):
      request = _request(i)
      key = request.key('c')
      ledger.begin(key, 'c', 's', 1e-3)
      ledger.put(key, 'c', 's', request, reply)
    calls = _milliseconds(call, range(args.entries, args.entries + 5000))
    ledger.close()
    print(json.dumps({
        'benchmark': 'ledger', 'machine': harness.machine(harness.cpu()),
        'entries': args.entries, 'file_bytes': os.path.getsize(path),
        'open_ms': round(1e3 * opened, 2),
        **{f'{name}_{what}_ms': round(value, 4)
           for name, times in (('hit', found), ('miss', missed),
                               ('call', calls))
           for what, value in (('p50', statistics.median(times)),
                               ('p99', times[len(times) * 99 // 100]))}}))


if __name__ == '__main__':
  main()
