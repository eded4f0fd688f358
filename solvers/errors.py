"""The error of solvers and guidance that a person can put right, and the warning that a person should read."""


class UserError(ValueError):
    """What was asked for cannot be done. The message is one sentence for a person: it names the value and the remedy.

    The command line prints it without a traceback, and ends with `exit_code`.
    """

    exit_code = 2


class Caution(UserWarning):
    """What was asked for is done, and may not be what was meant. The message is one sentence for a person."""
