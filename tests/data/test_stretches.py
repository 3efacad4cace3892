"""Long texts in stretches: the tokens are those of the whole text, for each kind of tokenizer."""

from typing import Any

import pytest
from tests.support import marking_tokenizers, piece_tokenizers
from tests.support.piece_tokenizers import OVER_LINES, text_of_pieces
from tests.support.tokenizers import EOS, byte_tokenizer
from transformers import AutoTokenizer

from swlora.data import examples, stretches, tokenise
from swlora.data.encode import encode_examples
from swlora.data.examples import Example
from swlora.data.stretches import in_stretches, is_long, long_ids
from swlora.data.tokenise import token_ids
from swlora.errors import DataError

TOKENIZERS = {
    **piece_tokenizers.TOKENIZERS,
    **{f"{name}, small": own for name, own in marking_tokenizers.TOKENIZERS.items()},
    "bytes": byte_tokenizer("<s> $A", bos_token="<s>"),
}
LINES = {
    "CRLF": "Near the river.\r\n",
    "blank lines": "Near the river.\n\n",
    "blank lines, CRLF": "Near the river\r\n\r\n",
    "no full stop": "Near the river\n",
    "full stops of Chinese": "河边有一家饭店。\n",
    "quotation marks": "“Near the river?”\n",
    "indented": "    near(the, river) {\n",
    "blanks at the end": "Near the river. \n",
    "a list": "- near the river;\n",
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "BYTES_AT_ONCE", 60)
    monkeypatch.setattr(examples, "MAX_TEXT_BYTES", 120)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands beside the line breaks; less is looked at around a cut than there is."""
    monkeypatch.setattr(stretches, "_AROUND", 130)
    monkeypatch.setattr(examples, "MAX_TEXT_BYTES", 10_000)
    tokenizer, n_cuts = TOKENIZERS[name], 0
    for seed in range(1000, 1010):
        text = text_of_pieces(seed, 300)
        found = in_stretches(text, tokenizer)
        assert "".join(found) == text
        assert long_ids(text, tokenizer) == token_ids([text], tokenizer, special=True)[0]
        n_cuts += len(found) - 1
    assert n_cuts > 100


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", sorted(TOKENIZERS.keys() - OVER_LINES))
def test_lines_of_any_kind_are_cut(name: str, line: str) -> None:
    text = "Title\n" + 30 * LINES[line]
    found = in_stretches(text, TOKENIZERS[name])
    assert max(len(stretch.encode()) for stretch in found) < 60 + 2 * len(LINES[line].encode())
    whole = token_ids([text], TOKENIZERS[name], special=True)[0]
    assert long_ids(text, TOKENIZERS[name]) == whole


def test_gpt_2(shared_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_TEXT_BYTES", 10_000)
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "gpt2-tokenizer")
    text = "".join(30 * line for line in LINES.values()) + text_of_pieces(0, 300)
    assert long_ids(text, tokenizer) == tokenizer(text)["input_ids"]


def test_what_is_long_is_said_by_bytes() -> None:
    assert not is_long("a" * 60) and is_long("a" * 61)
    assert not is_long("文" * 20) and is_long("文" * 21)


def encoded(*texts: str, **options: Any) -> Any:
    rows = [Example(text=text) for text in texts]
    arguments: dict[str, Any] = {"context_tokens": 500, "truncate": False, **options}
    return encode_examples(rows, "\n", byte_tokenizer(), **arguments)


def test_a_text_that_cannot_be_cut_is_refused_with_its_place() -> None:
    lines = "many words.\n" * 20
    assert encoded(lines).sequences.tokens.tolist() == [EOS, *lines.encode(), EOS]
    said = (
        r"row 2: it is too long \(130 bytes of text without a line break to cut it at, and 120 is"
    )
    for long in ("a" * 130, "文" * 43 + "a", f"{lines}{'a' * 129}\n{lines}"):
        with pytest.raises(DataError, match=said):
            encoded(lines, long)
    assert encoded(lines, "a" * 130, skip_bad_rows=True).bad == {"it is too long": 1}


def test_a_line_break_before_a_long_line_is_not_passed_over() -> None:
    text = f"{'a' * 49}\n{'b' * 99}\n{'c' * 119}\n"
    assert [len(found) for found in in_stretches(text, byte_tokenizer())] == [50, 100, 120]
    assert encoded(text).bad == {}
