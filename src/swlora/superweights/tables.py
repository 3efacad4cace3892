"""Tables of Markdown, and numbers as they stand in them."""

from collections.abc import Iterable, Sequence
from html import escape


def number(ratio: float) -> str:
    """Write a ratio with two decimals, or as a power of ten where it is large."""
    return f"{ratio:.2f}" if ratio < 1e5 else f"{ratio:.1e}"


def interval(low: float, high: float) -> str:
    """Write the bounds of an effect's ratio."""
    return f"{number(low)} to {number(high)}"


def table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Return a table of rows of cells under a head."""
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Return any text as it may stand in a table: one line, nothing read as markup."""
    plain = escape("\n".join(text.strip().expandtabs(4).splitlines()), quote=False)
    for mark in "\\`*_[]|~":
        plain = plain.replace(mark, f"\\{mark}")
    printable = (c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in plain)
    return "".join(printable).replace("\n", "<br>") or "(nothing)"
