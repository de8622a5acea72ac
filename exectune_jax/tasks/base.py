"""What a task is: problems, core prompt, verdict and leak check.

To bring your own, subclass `Task`; where answers are numbers subclass
`MathTask`, where they are programs `CodeTask`, and write `problems` alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from exectune_jax import prompts
from exectune_jax.episode import Problem, Verdict
from exectune_jax.errors import UserError
from exectune_jax.tasks import numbers, sandbox, verify_code, verify_math


class Task:
  """A family of problems.

  Args:
    options: the `config.task` section.
    shots: worked examples in the core's prompt (`config.core.shots`).
  """

  def __init__(self, options, shots: int = 0):
    self.options = options
    self.shots = shots

  def check(self) -> None:
    """Raises UserError where this machine cannot judge replies.

    Called before any reply is paid for.
    """

  def problems(self, split: str) -> Sequence[Problem]:
    """Problems of 'train', 'validation' or 'test'; must not overlap."""
    raise NotImplementedError

  def core_messages(self, problem: Problem,
                    strategy: str | None) -> prompts.Messages:
    """The request to the core, with the strategy or alone (None)."""
    raise NotImplementedError

  def verify(self, problem: Problem, text: str) -> Verdict:
    """Judges a core's reply. Raises errors.Lost if that cannot be done."""
    raise NotImplementedError

  def reveals_answer(self, problem: Problem, strategy: str) -> bool:
    """Whether the strategy states the answer instead of a way to it."""
    raise NotImplementedError


class MathTask(Task):
  """Everything but `problems`, for problems whose answer is a number."""

  def core_messages(self, problem, strategy):
    return prompts.math_core_messages(problem.question, strategy, self.shots)

  def verify(self, problem, text):
    return verify_math.verify(problem.answer, text)

  def reveals_answer(self, problem, strategy):
    """True if the answer's value is written where it can only be a result.

    A number that also stands in the question is an operand, unless it
    follows '=' or 'answer'. Which notations are read: tasks/numbers.py.
    """
    answer = verify_math.to_fraction(problem.answer)
    if answer is None:  # no numeric answer: look for the text itself
      return problem.answer.strip().lower() in strategy.lower()
    strategy = numbers.plain_digits(strategy)
    given = {value for value, _ in numbers.stated(
        numbers.plain_digits(problem.question))}
    for value, start in numbers.stated(strategy):
      before = strategy[:start].lower().rstrip(' $*:')
      stated = re.search(r'(=|answer|answer is|equals|result is)$', before)
      if value == answer and (stated or value not in given):
        return True
    return False


class CodeTask(Task):
  """Everything but `problems`, for problems that ask for a Python program.

  Problems carry `tests`, and the reference program as their answer. Reads
  task.timeout_s, task.memory_mb and task.unsafe_subprocess.
  """

  def __init__(self, options, shots: int = 0):
    super().__init__(options, shots)
    if shots:
      raise UserError(f'core.shots={shots}: there are no worked examples of '
                      'programs; set it to 0')
    self._sandbox = sandbox.Sandbox(options.timeout_s, options.memory_mb,
                                    options.unsafe_subprocess)
    self._checked = False  # every Executor asks

  def check(self):
    if not self._checked:
      sandbox.probe(self._sandbox, f"task.name='{self.options.name}'")
      self._sandbox.close()  # the graders have their own
      self._checked = True

  def core_messages(self, problem, strategy):
    return prompts.code_core_messages(problem.question, strategy)

  def verify(self, problem, text):
    tests = problem.tests
    program = verify_code.extract_program(text, tests.setup,
                                          tests.entry_point)
    verdict = self._sandbox.judge(tests.setup, program, tests.source,
                                  tests.entry_point)
    return Verdict(verdict == 'passed', verdict)

  def reveals_answer(self, problem, strategy):
    return verify_code.contains_program(strategy, problem.answer)
