"""Word problems answered by a Python program: code tasks without a network."""

from __future__ import annotations

import dataclasses

from exectune_jax.episode import Tests
from exectune_jax.tasks.base import CodeTask
from exectune_jax.tasks.word_problems import WordProblems


class WordPrograms(CodeTask):
  """Reads the same options as word_problems."""

  def __init__(self, options, shots=0):
    super().__init__(options, shots)
    self._words = WordProblems(options)

  def problems(self, split):
    return [dataclasses.replace(
        p, question=f'{p.question} Write a function solve() that returns it.',
        tests=Tests(f'assert abs(solve() - ({p.answer})) < 1e-9', 'solve'))
            for p in self._words.problems(split)]

  def reveals_answer(self, problem, strategy):
    return (super().reveals_answer(problem, strategy)
            or self._words.reveals_answer(problem, strategy))
