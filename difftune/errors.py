"""Errors that a user can put right. The command line prints them as one sentence, without a traceback."""


class UserError(ValueError):
    """What was asked for cannot be done; the message names the value and the remedy."""

    exit_code = 2


class RunError(UserError):
    """What was asked for was right, and went wrong: a reward that is not finite, a file that is corrupt."""

    exit_code = 1
