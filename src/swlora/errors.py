"""Errors a person can act on: one line, what is wrong and what to do, and an exit code.

Exit codes of the command line: 0 done, 2 usage or bad input, 1 failure.
"""


class UserError(Exception):
    """A mistake in what was asked for or given; shown as one line, exit code 2."""

    exit_code = 2


class DataError(UserError):
    """Rows of a data set that cannot be used; the message names file, line and reason."""


class UnknownFamilyError(UserError):
    """A model architecture without a tested anatomy."""


class RunFailedError(UserError):
    """Work that was asked for correctly and could not be finished; exit code 1."""

    exit_code = 1


class DivergedError(RunFailedError):
    """A training whose loss or gradient is no number any more."""
