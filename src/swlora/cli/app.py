"""The application that verbs register with, and the options that many of them share."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Fine-tune language models with LoRA fast, and find their super weights.\n\n"
        "The whole job on a real model: `swlora train-eval --model builtin --layers super`"
    ),
)

Config = Annotated[
    Path | None, typer.Option("--config", help="YAML with any of these settings; flags win")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, help="also write the result here, as JSON"),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="run folder [default: runs/COMMAND-TIME]")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of a failure")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the unfinished run in --output")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="adapter or run folder [default: the base model]")
]
Overrides = dict[str, Any]
