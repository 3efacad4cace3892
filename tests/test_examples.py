"""What the documents show works: example configurations load, commands in all documents parse."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from tests.support.document_blocks import PAGES, ROOT, blocks

from swlora.cli.app import app
from swlora.config import RunSpec, load_spec

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
STARTER = "examples/starter.yaml"


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"starter.yaml", "demo.yaml"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    load_spec(path, {})


def test_the_starter_works_offline_and_shows_the_defaults_of_all_else() -> None:
    path = ROOT / "examples" / "starter.yaml"
    names = {"model.name": "builtin", "data.name": "sample"}
    assert load_spec(path, {}) == load_spec(None, names)
    shown = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(shown) == set(RunSpec.model_fields)


def _commands() -> list[tuple[str, str, bool]]:
    """List (document, command, is it a mention) for every `swlora VERB ...` in the documents.

    A mention is code within a sentence: it may leave out what the command must have.
    """
    found = [
        (page, command.text, False)
        for page in PAGES
        for block in blocks(page)
        for command in block.commands
        if command.text.startswith("swlora ")
    ]
    for name in (*PAGES, STARTER):
        text = (ROOT / name).read_text(encoding="utf-8")
        found += [(name, command, True) for command in re.findall(r"`(swlora [a-z][^`\n]*)`", text)]
    starter = (ROOT / STARTER).read_text(encoding="utf-8")
    lines = re.findall(r"^# {4,}(swlora [a-z].*)$", starter, flags=re.MULTILINE)
    return found + [(STARTER, command, False) for command in lines]


def test_the_list_of_commands_has_an_example_of_each() -> None:
    verbs = {command.split()[1] for name, command, _ in _commands() if name == "docs/commands.md"}
    assert verbs >= set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("document", "command", "is_mention"), _commands())
def test_every_command_shown_parses(document: str, command: str, is_mention: bool) -> None:
    verb, *arguments = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    parser = group.commands[verb]  # type: ignore[attr-defined]
    try:  # raises for an unknown flag or a value of another type
        parser.make_context(verb, arguments)
    except Exception as error:  # typer brings its own click, whose classes have no public place
        if not (is_mention and type(error).__name__ in ("MissingParameter", "BadOptionUsage")):
            raise
