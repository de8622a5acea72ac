"""Grader processes: whatever a task's code does, graded or lost, never 0."""

import asyncio
import os
import time

import pytest

from exectune_jax.episode import Problem, Verdict
from exectune_jax.errors import Lost
from exectune_jax.rewards import graders

PROBLEM = Problem('p', 'What is 2 * 3?', '6')
RIGHT = 'The answer is 6.'


def grade(config, *texts, processes=2, together=True):
  """Verdict or Lost of every text; what was running at the end."""
  config.task.name = 'hostile_task:Hostile'
  async def run():
    pool = graders.Graders(config.task, 0, processes)
    try:
      calls = [pool.verify(PROBLEM, t) for t in texts]
      if together:
        return await asyncio.gather(*calls, return_exceptions=True)
      return [(await asyncio.gather(c, return_exceptions=True))[0]
              for c in calls]
    finally:
      pids = [w._process.pid for w in pool._idle]
      await pool.close()
      for pid in pids:
        with pytest.raises(ProcessLookupError):
          os.kill(pid, 0)
  return asyncio.run(run())


@pytest.mark.parametrize('text, said', [
    ('crash', "KeyError('user code')"), ('die', 'crashed'),
    ('exit', 'crashed: gone'), ('hang', 'no verdict in 2 s'),
    ('spin', 'no verdict in 2 s')])
def test_what_fails_is_lost_and_the_next_is_graded(config, monkeypatch, text,
                                                   said):
  # Two seconds: one of its own, one that the task's programs may take.
  monkeypatch.setattr(graders, 'DEADLINE_S', 1.0)
  config.task.timeout_s = 1.0
  began = time.monotonic()
  bad, good = grade(config, text, RIGHT, processes=1, together=False)
  assert isinstance(bad, Lost) and said in str(bad)
  assert good == Verdict(True, '6')
  assert time.monotonic() - began < 30


def test_a_task_that_prints_does_not_garble_verdicts(config):
  assert grade(config, 'print', 'The answer is 5.', processes=1) == [
      Verdict(False), Verdict(False, '5')]


def test_graders_see_no_keys(config, monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret')
  assert grade(config, 'environment') == [Verdict(False, '7')]


def test_workers_are_recycled(config, monkeypatch):
  monkeypatch.setattr(graders, 'RECYCLE', 3)
  started, plain = [], graders._Worker._start
  async def start(self):
    started.append(self)
    await plain(self)
  monkeypatch.setattr(graders._Worker, '_start', start)
  found = grade(config, *[RIGHT] * 7, processes=1)
  assert found == [Verdict(True, '6')] * 7
  assert len(started) == 3


def test_latex_that_takes_for_ever_is_lost(config, monkeypatch):
  monkeypatch.setattr(graders, 'DEADLINE_S', 3.0)
  config.task.timeout_s = 1.0
  evil = r'\boxed{' + '9^{' * 12 + '9' + '}' * 12 + '}'
  bad, good = grade(config, evil, r'\boxed{\frac{12}{2}}', processes=1,
                    together=False)
  assert isinstance(bad, Lost) or bad == Verdict(False, bad.extracted)
  assert good.correct
