"""`swlora env`, `init`, `check`, `schema`: before a training, the machine and the configuration."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from swlora.cli.command import JSON, Invocation
from swlora.cli.process import no_library_notes
from swlora.cli.show import show_table
from swlora.cli.verbs import verb
from swlora.command_settings import SETTINGS
from swlora.errors import UserError
from swlora.printable import escaped

File = Annotated[Path, typer.Argument(dir_okay=False, help="YAML of a run or of a study")]


@verb("env", JSON)
def env(invocation: Invocation) -> None:
    """Show the machine as swlora sees it, and what a training takes here: device, dtype, threads.

    Measures what matrix products reach, which later runs compare themselves with.

    Example: `swlora env --json env.json`
    """
    from swlora.machine import lines, machine_facts

    facts = machine_facts(invocation.progress)
    show_table([(name, escaped(value)) for name, value in lines(facts)])
    invocation.finish(facts)


@verb("init", JSON, settings=SETTINGS["init"])
def init(
    invocation: Invocation,
    file: Annotated[
        Path, typer.Argument(dir_okay=False, help="the YAML file that is written")
    ] = Path("swlora.yaml"),
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="also write swlora.schema.json beside it, for editors"),
    ] = False,
) -> None:
    """Write a configuration for a model and a data file, with the reason of each value.

    Of the model only tokenizer and configuration are read.

    Example: `swlora init mine.yaml --model builtin --dataset rows.jsonl`
    """
    if invocation.flags["data.name"] is None:
        raise UserError("init needs the data that are to be trained on: --dataset rows.jsonl")
    from swlora.starting_config import write_starting_config

    written = write_starting_config(
        file, invocation.spec, invocation.progress, force=force, schema=schema
    )
    print(f"configuration: {file}")
    if written.schema:
        print(f"schema: {written.schema}")
    shown = shlex.quote(str(file))
    print(f"next: swlora check {shown}; swlora {written.command} --config {shown}")
    invocation.finish(written)


@verb("check", JSON)
def check(invocation: Invocation, file: File) -> None:
    """Check a configuration: every fault by its name, and what the settings come to.

    Reads the data and the model's configuration and tokenizer, never its weights; exit code 2
    where something is wrong.

    Example: `swlora check examples/starter.yaml`
    """
    from swlora.config_check import check_config

    no_library_notes()
    found = check_config(file)
    if found.resolved:
        show_table([(name, escaped(value)) for name, value in found.resolved])
    for line in found.unchecked:
        print(f"not looked at: {escaped(line)}")
    for line in found.problems:
        print(f"{file}: {escaped(line)}", file=sys.stderr)
    if not found.problems:
        print(f"{file}: nothing is wrong with this {found.kind}")
    invocation.finish(found)
    if found.problems:
        raise typer.Exit(2)


@verb("schema")
def schema(
    _invocation: Invocation,
    study: Annotated[bool, typer.Option("--study", help="of a study, for `compare`")] = False,
) -> None:
    """Print the JSON schema of a configuration, for editors that check and complete YAML.

    Example: `swlora schema > swlora.schema.json`
    """
    from swlora.config_schema import run_schema, study_schema

    print(json.dumps(study_schema() if study else run_schema(), indent=1))
