"""The application that commands are made of, and the options that several of them have."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swlora import __version__
from swlora.cli.command import command

if TYPE_CHECKING:
    from swlora.evaluation.user_metrics import UserMetric

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Fine-tune language models with LoRA fast, and find their super weights.\n\n"
        "The whole job on a real model: `swlora train-eval --model builtin --layers super`"
    ),
)
verb = partial(command, app)
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="adapter or run folder, on the model that it was trained on where --model names none "
        "[default: the base model]",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option("--metrics", help="your own: FILE.py:function of predictions and references"),
]


def named_metric(name: str | None) -> "UserMetric | None":
    """Load a metric of one's own, before anything else that takes time."""
    if name is None:
        return None
    from swlora.evaluation.user_metrics import load_metric

    return load_metric(name)


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
