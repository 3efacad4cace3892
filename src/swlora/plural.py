"""Numbers of things as a person writes them: 1 row, 2,000 rows."""


def counted(n: int, noun: str, nouns: str = "") -> str:
    """Return how many there are of something; `nouns` where that is not `noun` with an s."""
    return f"{n:,} {noun if n == 1 else nouns or f'{noun}s'}"


def are(n: int) -> str:
    """Return the verb behind so many things."""
    return "is" if n == 1 else "are"
