"""One thing, several things."""

import pytest

from swlora.plural import are, counted


@pytest.mark.parametrize(
    ("n", "said"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234567, "1,234,567 rows")]
)
def test_so_many_rows(n, said) -> None:
    assert counted(n, "row") == said


def test_words_that_are_no_longer_by_an_s() -> None:
    assert [counted(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
    assert [are(n) for n in (0, 1, 2)] == ["are", "is", "are"]
