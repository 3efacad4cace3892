"""Text of others: what could act on a terminal is written as a code, everything else stays."""

from swlora.printable import escaped


def test_what_is_not_printable_is_written_as_a_code() -> None:
    assert escaped("a\tb\r\x1b[2J\x07\x85") == r"a\tb\r\x1b[2J\x07\x85"
    assert escaped("\u202e\u2028\u200b\ufeff\ud800") == r"\u202e\u2028\u200b\ufeff\ud800"
    assert escaped("é 中 🎉 [red]\\n") == "é 中 🎉 [red]\\n"
