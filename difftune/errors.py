"""Errors that a person can put right: the command line prints them as one sentence, without a traceback.

`rewards` and `solvers` import nothing from above, so each has a base of its own; `guidance` uses that of `solvers`.
"""

from rewards.errors import RewardError
from solvers.errors import UserError


class RunError(UserError):
    """What was asked for was right, and went wrong: a file that is corrupt, a disk that is full."""

    exit_code = 1


class DiskError(RunError, OSError):
    """A file or a folder cannot be read or written."""


ERRORS = (UserError, RewardError)  # the bases of all errors whose message is a sentence for a person
