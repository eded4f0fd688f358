"""The errors of rewards that a person can put right."""


class RewardError(ValueError):
    """What was asked for cannot be done. The message is one sentence for a person: it names the value and the remedy.

    The command line prints it without a traceback, and ends with `exit_code`.
    """

    exit_code = 2


class NotFinite(RewardError):
    """A reward, or a gradient, is infinite or not a number."""

    exit_code = 1


class WeightsMissing(RewardError, FileNotFoundError):
    """What a reward needs on the disk is not there."""

    exit_code = 1


class NotFetched(WeightsMissing):
    """What a reward downloads is not there, and no network is."""


class Unreachable(RewardError, ConnectionError):
    """A server gives no answer, or none that can be used."""

    exit_code = 1


class ExtraMissing(RewardError, ModuleNotFoundError):
    """A library that a reward needs is not installed."""

    exit_code = 1
