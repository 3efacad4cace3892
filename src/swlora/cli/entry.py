"""Run the command line: parse, call the verb, turn errors into one line and an exit code.

Exit codes: 0 done, 2 usage or bad input, 1 failure, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from swlora.cli import cache, chat, verbs  # noqa: F401  they register the commands
from swlora.cli.app import DEBUG, app
from swlora.errors import UserError

COMPLETION = "_SWLORA_COMPLETE"  # set by the shell that asks how a word goes on


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    if COMPLETION in os.environ:
        command.main(arguments, "swlora")  # answers the shell
    context = None
    try:
        # Not command.main(): it has its own, changing, ways with interruptions and errors.
        with command.make_context("swlora", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None
    except UserError as error:
        _fail(error, error.exit_code, context)
    except KeyboardInterrupt as error:
        _fail(error, 130, context)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's
            _fail_usage(error)
        _fail(error, 1, context)


def _fail_usage(error: Any) -> NoReturn:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        verb = error.ctx.command_path if getattr(error, "ctx", None) else "swlora"
        message = error.format_message().rstrip(".")
        print(f"swlora: {message}; see {verb} --help", file=sys.stderr)
    raise SystemExit(2)


def _fail(error: BaseException, exit_code: int, context: Any) -> NoReturn:
    if context is not None and context.meta.get(DEBUG):
        raise error
    if isinstance(error, UserError):
        message = str(error)
    elif exit_code == 130:
        message = str(error) or "interrupted"
    else:
        text = " ".join(str(error).split())[:300]
        message = f"{type(error).__name__}: {text} (--debug shows where)"
    print(f"swlora: {message}", file=sys.stderr)
    raise SystemExit(exit_code)
