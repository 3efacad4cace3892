"""The code of the documents, as Markdown shows it to a reader: blocks, and commands in tables."""

import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *("README.md", "CONTRIBUTING.md"),
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
)
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?:%|\s[KMG]?B\b|(?!\w))"
)


@dataclass(frozen=True)
class Command:
    """A line to be typed, put together where it goes on in the next, and what is shown below it."""

    text: str
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A block of code; `line` is the number of its first line in its page, from 1."""

    page: str
    line: int
    text: str
    language: str

    @property
    def is_python(self) -> bool:
        return self.language == "python" or re.match(r"(import|from) \w", self.text) is not None

    @property
    def is_rows(self) -> bool:
        """Whether it is rows of data, a JSON object a line."""
        return all(line.startswith("{") for line in self.text.splitlines())

    @cached_property
    def commands(self) -> list[Command]:
        """What is to be typed into a shell: every line but comments; where some begin with a
        dollar sign those alone, and the others are what they print.
        """
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            typed = re.split(r"^\$ ", "\n".join(lines), flags=re.M)[1:]
            return [Command(first, tuple(shown)) for first, *shown in map(str.splitlines, typed)]
        return [Command(line) for line in lines if line.strip() and not re.match(r"\s*#", line)]


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """Return the indented and fenced blocks of a page of the repository, in their order, and the
    commands that fill a cell of a table, as blocks of one line.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    found, line = [], 0
    for token in MarkdownIt().enable("table").parse(text):
        line = token.map[0] + 1 if token.map else line
        if token.type in ("fence", "code_block"):
            found.append(Block(page, line, token.content, token.info))
        elif token.type == "inline" and re.fullmatch(r"`swlora [^`]*`", token.content):
            found.append(Block(page, line, token.content.strip("`"), ""))
    return tuple(found)


def shapes(lines: list[str] | tuple[str, ...]) -> list[str]:
    """Return lines that are not empty without their figures and columns, to compare the rest."""
    return [shape for line in lines if (shape := " ".join(_NUMBER.sub("#", line).split()))]
