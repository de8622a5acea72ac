"""Ways in which a run, or one episode of it, ends early on purpose."""


class UserError(Exception):
  """Something the user can mend; main prints it as one line, exit code 1.

  The text names the field, the value seen and the fix.
  """


class UsageError(UserError):
  """The command line itself is wrong; exit code 2."""


class Stopped(Exception):  # noqa: N818
  """Ctrl-C or SIGTERM was seen at a safe point; all work is on disk."""


class BudgetExhausted(UserError):
  """The next core call could exceed `budget_usd`; all paid work is kept."""


class Lost(Exception):  # noqa: N818
  """Nobody can know how this episode would have ended.

  An API that failed after all retries, a deadline, a grader that crashed:
  never the strategy's fault, so the episode leaves the statistics.
  """
