"""Several processes that train one guide together, each with its devices.

All of them run the same programs in the same order. Each talks to cores about
its own groups; what must be decided together (shapes of a batch, whether to
stop) is exchanged here. The workdir must be a directory that all of them see,
or a bucket.
With one process, everything here is free.
"""

from __future__ import annotations

import json
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from exectune_jax import bucket, files
from exectune_jax.cores.ledger import Ledger, path_of
from exectune_jax.errors import UserError


def join(count: int) -> None:
  """Connects the processes of a run.

  Args:
    count: how many there are; 1 for this one alone, 0 where the platform
      knows (Cloud TPU). Else JAX_COORDINATOR_ADDRESS (host:port of the first
      one) and JAX_PROCESS_ID (0, 1, ...) come from the environment.
  """
  if count == 1:
    return
  if count == 0:
    jax.distributed.initialize()
    return
  try:
    address = os.environ['JAX_COORDINATOR_ADDRESS']
    index = int(os.environ['JAX_PROCESS_ID'])
  except (KeyError, ValueError) as e:
    raise UserError(
        f'mesh.hosts={count}: {e} in the environment: set '
        'JAX_COORDINATOR_ADDRESS=host:port and JAX_PROCESS_ID=0..'
        f'{count - 1} for each process, or mesh.hosts=0 on Cloud TPU') from e
  jax.distributed.initialize(address, count, index)


def count() -> int:
  return jax.process_count()


def index() -> int:
  return jax.process_index()


def first() -> bool:
  """Whether this process writes what only one should write."""
  return index() == 0


def barrier(name: str) -> None:
  """Waits for all processes; each then sees what the others have written."""
  ship()
  if count() > 1:
    with jax.transfer_guard('allow'):
      multihost_utils.sync_global_devices(name)
  bucket.refresh()


def ship() -> None:
  """`bucket.flush`, after which all processes go on or none does."""
  error = None
  try:
    bucket.flush()
  except UserError as e:
    error = e
  if agree(error is not None):
    raise error or UserError('another process cannot write to the bucket')


def gather(values) -> np.ndarray:
  """Equally shaped arrays of all processes, stacked, [processes, ...]."""
  values = np.asarray(values)
  if count() == 1:
    return values[None]
  with jax.transfer_guard('allow'):
    return np.asarray(multihost_utils.process_allgather(values))


def mean(values: dict[str, float], weight: float = 1.0) -> dict[str, float]:
  """Means over all processes, of which each has a weight; none if all have
  none."""
  rows = np.array(gather_json([weight, *values.values()]))
  if not rows[:, 0].any():
    return {}
  means = np.average(rows[:, 1:], axis=0, weights=rows[:, 0])
  return dict(zip(values, means.tolist(), strict=True))


def gather_json(value) -> list:
  """Plain data of all processes, in their order."""
  if count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = gather(np.array(len(text)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[:len(text)] = text
  return [json.loads(row[:n].tobytes())
          for row, n in zip(gather(padded), sizes, strict=True)]


def budget(config, workdir, sharers: int) -> float:
  """Dollars at which this process's ledger is full, in a stage that `sharers`
  of the processes pay for: its own bill, and its share of what the bills of
  all leave of the budget. 0: no limit.

  Of processes that a resumed run no longer has, nobody knows the bills.
  """
  if not config.budget_usd or count() == 1:
    return config.budget_usd
  ledger = Ledger(path_of(config, workdir, index()))
  own = ledger.spent_usd + ledger.in_doubt_usd
  ledger.close()
  bills = gather_json(own)
  # Ledgers that are shared by way of a bucket hold each other's bills.
  known = max(bills) if files.is_url(config.ledger) else sum(bills)
  return max(own + (config.budget_usd - known) / sharers, 1e-12)


def agree(wanted: bool) -> bool:
  """Whether any process wants it; the same answer in all of them."""
  return bool(gather(np.array(wanted)).any())

