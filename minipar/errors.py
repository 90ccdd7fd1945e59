"""The errors a user meets. Each carries one clear line: what was named, what was expected, what to do.

The command line turns them into an exit code without a traceback: 2 for wrong usage, 1 for a failure.
"""


class MiniparError(Exception):
    """Base of every error that is reported as one line instead of a traceback."""

    exit_code = 1


class UsageError(MiniparError, ValueError):
    """An option, shape, size or layout that cannot be: refused before any work is done."""

    exit_code = 2


class DataError(MiniparError, ValueError):
    """A data set whose contents are unusable: truncated, empty, or holding NaN."""


class CommunicationError(MiniparError, RuntimeError):
    """A communication that cannot go on: the base of the three kinds below."""


class MismatchError(CommunicationError):
    """Ranks called different operations, or the same one with arguments that do not agree."""


class HangError(CommunicationError):
    """No rank can go on, or a wait reached the time-out; the message says what every rank was waiting for.

    Rank-threads are seen to wait for each other as soon as they do; between processes only the time-out tells.
    """


class RankFailed(CommunicationError):
    """Another rank raised, so this rank's wait was ended; the message names that rank and its error."""
