"""Run the command line: parse, call the verb, exit with its code."""

import io
import os
import sys
from collections.abc import Sequence

import typer

from swlora.cli.app import app
from swlora.cli.failure import fail_usage, is_usage_error

COMPLETION = "_SWLORA_COMPLETE"  # set by the shell that asks how a word goes on


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    _write_unknown_characters_as_codes()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    if COMPLETION in os.environ:
        command.main(arguments, "swlora")  # answers the shell
    try:
        # Not command.main(): it has its own, changing, ways with interruptions and errors.
        with command.make_context("swlora", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None
    except Exception as error:  # of a verb only with --debug
        if is_usage_error(error):
            fail_usage(error)
        raise


def _write_unknown_characters_as_codes() -> None:
    """Let stdout write what its encoding has not as a backslash code, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
