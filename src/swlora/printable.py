"""Text of others on a terminal or in a log, in which nothing acts on the terminal."""


def escaped(text: str) -> str:
    """Return text in which what is not printable is written as a backslash code."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
