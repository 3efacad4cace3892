"""The application that verbs register with, and the options that many of them share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from swlora import __version__
from swlora.files import check_writable

DEBUG = "swlora.debug"  # in the meta data of the context

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Fine-tune language models with LoRA fast, and find their super weights.\n\n"
        "The whole job on a real model: `swlora train-eval --model builtin --layers super`"
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swlora {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="show the version and exit", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take the options that come before the command."""


def _note_debug(context: typer.Context, wanted: bool) -> bool:
    context.meta[DEBUG] = wanted
    return wanted


def _can_be_written(path: Path | None) -> Path | None:
    if path is not None:
        check_writable(path.parent, "--json")
    return path


Config = Annotated[
    Path | None, typer.Option("--config", help="YAML with any of these settings; flags win")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        dir_okay=False,
        help="also write the result here, as JSON",
        callback=_can_be_written,
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="run folder [default: runs/COMMAND-TIME]")
]
OutputIfAny = Annotated[Path | None, typer.Option("--output", help="run folder [default: none]")]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="show the traceback of a failure", callback=_note_debug, is_eager=True
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue the unfinished run in --output")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="adapter or run folder [default: the base model]")
]
Overrides = dict[str, Any]
