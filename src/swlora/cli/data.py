"""`swlora data`: what a training would see of its data, for a person."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from swlora.cli.show import show_table
from swlora.plural import counted
from swlora.printable import escaped

if TYPE_CHECKING:
    from swlora.data.summary import DataSummary
    from swlora.preview import DataPreview, ShownRow, Span

MAX_CHARACTERS = 1200  # shown of a span
TRAINED, SPECIAL = "green", "dim"
BRACKETS = ("⟦", "⟧")


def show_preview(preview: "DataPreview") -> None:
    """Print the rows, what the data come to, and what a training would refuse."""
    console = Console(highlight=False, soft_wrap=True)
    in_colour = console.color_system is not None and not console.no_color
    if preview.shown:
        how = "green" if in_colour else f"between {' and '.join(BRACKETS)}"
        print(f"trained tokens are {how}\n")
    for row in preview.shown:
        _show_row(console, row, in_colour=in_colour)
    _show_summary(preview.summary)
    for reason in preview.refused:
        print(f"a training refuses {reason}")


def _show_row(console: Console, row: "ShownRow", *, in_colour: bool) -> None:
    for number, sequence in enumerate(row.sequences, start=1):
        which = f", sequence {number} of {row.n_sequences:,}" if row.n_sequences > 1 else ""
        counts = f"{counted(sequence.n_tokens, 'token')}, {sequence.n_trained_tokens:,} trained"
        console.print(Text(f"{escaped(row.place)}{which}: {counts}", style="bold"))
        text = _marked(sequence.spans, in_colour=in_colour)
        text.rstrip()
        console.print(text)
        print()


def _marked(spans: "Sequence[Span]", *, in_colour: bool) -> Text:
    """Return a sequence with its trained tokens in colour or between brackets."""
    text = Text()
    for weight, own in groupby(spans, key=lambda span: span.weight):
        begin, end = BRACKETS if weight and not in_colour else ("", "")
        text.append(begin + (f"{weight:g}: " if weight not in (0, 1) else ""))
        for span in own:
            styles = {TRAINED: weight > 0, SPECIAL: span.is_special}
            style = " ".join(style for style, is_on in styles.items() if is_on and in_colour)
            text.append(_visible(span.text), style=style)
        if end and text.plain.endswith("\n"):
            text.right_crop()
            end += "\n"
        text.append(end)
    return text


def _visible(text: str) -> str:
    """Return text in which nothing acts on the terminal; a long one without its middle."""
    if (n_left_out := len(text) - MAX_CHARACTERS) > 0:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]} … {counted(n_left_out, 'character')} … {text[-half:]}"
    return "↵\n".join(escaped(line) for line in text.split("\n"))


def _show_summary(summary: "DataSummary") -> None:
    from swlora.data.summary import doubtful_facts, split_facts, step_facts

    splits = [split for split in (summary.train, summary.held_out) if split]
    columns = [split_facts(split) for split in splits]
    table = [(facts[0][0], *(value for _, value in facts)) for facts in zip(*columns, strict=True)]
    of_all = [*step_facts(summary.steps)] if summary.steps else []
    blank = [""] * (len(splits) - 1)
    table += [(name, escaped(value), *blank) for name, value in of_all + doubtful_facts(summary)]
    show_table([("", *(split.split for split in splits)), *table])
