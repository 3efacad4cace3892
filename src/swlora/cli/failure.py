"""How a command fails: one line on stderr and an exit code; with --debug, a traceback.

Exit codes: 0 done, 2 usage or bad input, 1 failure, 130 interrupted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from swlora.errors import UserError
from swlora.processes import is_speaker


@contextmanager
def failure_in_one_line(*, debug: bool) -> Iterator[None]:
    """Turn an error of the body into its line and SystemExit; let it pass where `debug` is set."""
    try:
        yield
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        exit_code, message = _explained(error)
        if is_speaker():
            print(f"swlora: {message}", file=sys.stderr)
        raise SystemExit(exit_code) from None


def _explained(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, str(error) or "interrupted"
    text = " ".join(str(error).split())[:300]
    return 1, f"{type(error).__name__}: {text} (--debug shows where)"


def is_usage_error(error: Exception) -> bool:
    """Say whether typer raised it for what was typed; it has no public name for these errors."""
    return hasattr(error, "format_message")


def fail_usage(error: Any) -> NoReturn:
    """Say what was wrong with what was typed, and where help is."""
    if not is_speaker():
        raise SystemExit(2)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        verb = error.ctx.command_path if getattr(error, "ctx", None) else "swlora"
        message = error.format_message().rstrip(".")
        print(f"swlora: {message}; see {verb} --help", file=sys.stderr)
    raise SystemExit(2)
