"""Grading in worker processes that can be killed.

A task's own code judges replies: it may hang, crash, or take the interpreter
down with it. It runs in processes of its own, on the CPU alone, under a
deadline; whatever happens there, an episode is graded or lost, never 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile

from exectune_jax.episode import Problem, Verdict, to_dict
from exectune_jax.errors import Lost

DEADLINE_S = 30.0  # for one text, beside what its programs may take
RECYCLE = 2000  # texts after which a worker is replaced
MAX_LINE = 64 << 20  # bytes of one question to a worker


class Graders:
  """A pool of workers for one task. Lives on one event loop.

  Args:
    options: config.task, from which the workers make the task.
    shots: config.core.shots.
    processes: how many workers.
  """

  def __init__(self, options, shots: int, processes: int):
    self._hello = json.dumps({'options': options.to_dict(), 'shots': shots})
    self._deadline_s = DEADLINE_S + options.timeout_s
    self._idle: list[_Worker] = []
    self._places = asyncio.Semaphore(processes)

  async def verify(self, problem: Problem, text: str) -> Verdict:
    """task.verify; raises Lost where that cannot be done."""
    return Verdict(**await self._ask('verify', problem, text))

  async def reveals_answer(self, problem: Problem, text: str) -> bool:
    """task.reveals_answer; raises Lost where that cannot be done."""
    return await self._ask('reveals_answer', problem, text)

  async def _ask(self, method: str, problem: Problem, text: str):
    line = json.dumps([method, to_dict(problem), text])
    async with self._places:
      worker = self._idle.pop() if self._idle else _Worker(self._hello)
      try:
        async with asyncio.timeout(self._deadline_s):
          kind, value = await worker.ask(line)
      except TimeoutError as e:
        raise Lost('grader gave no verdict in '
                   f'{self._deadline_s:g} s') from e
      except (OSError, ValueError, EOFError) as e:
        said = await worker.epitaph()
        raise Lost(f'grader crashed: {said or type(e).__name__}') from e
      else:
        if worker.done < RECYCLE:
          self._idle.append(worker)
          worker = None
      finally:
        if worker is not None:
          await worker.close()
    if kind == 'lost':
      raise Lost(value)
    return value

  async def close(self) -> None:
    for worker in self._idle:
      await worker.close()
    self._idle.clear()


class _Worker:
  """One process; started by the first question."""

  def __init__(self, hello: str):
    self._hello, self._process, self.done = hello, None, 0
    self._said = tempfile.TemporaryFile()  # a pipe could fill and block it

  async def ask(self, line: str):
    if self._process is None:
      await self._start()
    self._process.stdin.write(line.encode() + b'\n')
    await self._process.stdin.drain()
    answer = await self._process.stdout.readline()
    if not answer:
      raise EOFError
    self.done += 1
    return json.loads(answer)

  async def _start(self):
    # A task reads files, not keys; and no grader may take the accelerator.
    env = {k: v for k, v in os.environ.items() if not k.endswith('_API_KEY')}
    self._process = await asyncio.create_subprocess_exec(
        sys.executable, '-m', 'exectune_jax.rewards.grader_worker',
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=self._said, start_new_session=True,
        limit=MAX_LINE,
        env={**env, 'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '',
             'TPU_VISIBLE_CHIPS': '', 'PYTHONPATH': os.pathsep.join(sys.path)})
    self._process.stdin.write(self._hello.encode() + b'\n')

  async def epitaph(self) -> str:
    """The last line that a dead worker wrote about itself."""
    await self.close()
    size = self._said.seek(0, os.SEEK_END)
    self._said.seek(max(0, size - 2000))
    said = self._said.read().decode(errors='replace')
    return said.strip().rpartition('\n')[2][:200]

  async def close(self) -> None:
    """TERM, then KILL."""
    if self._process is None or self._process.returncode is not None:
      return
    with contextlib.suppress(ProcessLookupError):
      self._process.terminate()
      try:
        async with asyncio.timeout(1):
          await self._process.wait()
      except TimeoutError:
        os.killpg(self._process.pid, 9)
        await self._process.wait()
