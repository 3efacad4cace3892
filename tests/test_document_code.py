"""The code of README and docs: names exist in every block, and the first steps run."""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS

import swlora
from benchmarks import scenario_picture, tree_picture
from swlora.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("data", "train", "eval", "generate", "merge")  # not: llama.cpp to be there, a server


def _blocks(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.M):
        if re.match(r"\n* {4}(import|from) \w", block):
            yield dedent(block)


BLOCKS = [(page.name, block) for page in PAGES for block in _blocks(page)]


def test_blocks_are_found() -> None:
    assert {name for name, _ in BLOCKS} >= {"README.md", "python.md", "serve.md", "integrations.md"}


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_every_name_of_swlora_in_python_code_exists(page: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("swlora"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), name.name
        is_ours = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_ours and node.value.id == "swlora":
            assert hasattr(swlora, node.attr), node.attr


@pytest.fixture
def beginner(model_folder, tmp_path, monkeypatch, no_java) -> str:
    """A folder with rows.jsonl and rows.csv; a tiny model in the place of the embedded one."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    lines = ["prompt,completion", *(f'"{row["prompt"]}","{row["completion"]}"' for row in ROWS)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(model_folder("llama"))


@pytest.mark.parametrize("page", ["README.md", "python.md"])
def test_python_code_runs(page: str, beginner: str) -> None:
    (block,) = [block for name, block in BLOCKS if name == page]
    exec(block.replace('"builtin"', repr(beginner)), {})


def test_the_first_steps_run(beginner: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(rf"^ {{4}}swlora ((?:{'|'.join(RUN)}) .*)$", text, re.M)
    assert [command.split()[0] for command in commands] == list(RUN)
    for command in commands:
        words = shlex.split(command, comments=True)
        main([beginner if word == "builtin" else word for word in words])
    assert Path("merged/model.safetensors").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_what_is_generated_for_is_the_prompt_that_was_trained(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    row = json.loads(next(re.finditer(r'^ {4}({"prompt": .*})$', text, re.M))[1])
    (command,) = re.findall(r"^ {4}swlora (generate .*)$", text, re.M)
    assert shlex.split(command)[-1] == row["prompt"]


def test_the_pictures_are_those_of_the_committed_result() -> None:
    docs = ROOT / "docs"
    result = json.loads((docs / "results" / "scenarios-quick.json").read_text(encoding="utf-8"))
    drawn = {"rates": scenario_picture.picture(result), "tree": tree_picture.picture()}
    for name, picture in drawn.items():
        assert (docs / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == picture
