"""The error of solvers and guidance that a person can put right."""


class UserError(ValueError):
    """What was asked for cannot be done. The message is one sentence for a person: it names the value and the remedy.

    The command line prints it without a traceback, and ends with `exit_code`.
    """

    exit_code = 2
