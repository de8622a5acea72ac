"""A task whose own code misbehaves as the reply says (test_graders.py)."""

import os
import sys
import time

from exectune_jax.tasks.word_problems import WordProblems


class Hostile(WordProblems):
  def verify(self, problem, text):
    if text == 'crash':
      raise KeyError('user code')
    if text == 'hang':
      time.sleep(60)
    if text == 'spin':
      while True:
        pass
    if text == 'die':
      os.kill(os.getpid(), 11)
    if text == 'exit':
      sys.exit('gone')
    if text == 'print':
      print('["ok", {"correct": true}]' * 100_000)
      sys.stderr.write('x' * 1_000_000)
    if text == 'environment':
      return super().verify(problem, 'The answer is '
                            + ('6' if 'OPENAI_API_KEY' in os.environ else '7'))
    return super().verify(problem, text)
