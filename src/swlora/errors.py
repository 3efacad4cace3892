"""Errors a person can act on: one line, what is wrong and what to do, an exit code, and a code.

Exit codes of the command line: 0 done, 2 usage or bad input, 1 failure. The `code` of a class is
for programs: it is in run.json, and nothing else needs to read a message.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar


class UserError(Exception):
    """A mistake in what was asked for or given; shown as one line, exit code 2."""

    exit_code: ClassVar[int] = 2
    code: ClassVar[str] = "bad_input"


class DataError(UserError):
    """Rows of a data set that cannot be used; the message names file, line and reason."""

    code = "bad_data"


class NoSuperWeightError(UserError):
    """A layer policy that asks for super weights, in a model in which none was verified."""

    code = "no_super_weight"


class UnknownFamilyError(UserError):
    """A model architecture without a tested anatomy."""

    code = "unknown_family"


class RunFailedError(UserError):
    """Work that was asked for correctly and could not be finished; exit code 1."""

    exit_code = 1
    code = "failed"


class DivergedError(RunFailedError):
    """A training whose loss, gradient or weights are no numbers any more.

    `sequence_ids` are those of the step in which it happened, where it was in a step.
    """

    code = "diverged"
    sequence_ids: Sequence[int] = ()


def error_code(error: BaseException) -> str:
    """Return the code of an error: that of its class, "cancelled" or "unexpected"."""
    if isinstance(error, UserError):
        return error.code
    return "cancelled" if isinstance(error, KeyboardInterrupt | SystemExit) else "unexpected"


def brief(error: BaseException) -> str:
    """Return the error of a library in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def panic_named(what: str) -> Iterator[None]:
    """Make a UserError, `what` and the reason, of the panic of a library that is written in Rust.

    Such a PanicException is no Exception, so that whoever catches those lets it pass.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {brief(error)}") from error
