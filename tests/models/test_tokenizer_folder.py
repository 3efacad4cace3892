"""A tokenizer that must not be handed to a library, or at which one panics: one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.support.tokenizers import byte_tokenizer

from swlora.config import ModelSpec
from swlora.data.tokenise import piece_ids, token_ids
from swlora.errors import UserError
from swlora.models import tokenizer_folder
from swlora.models.load import load_skeleton
from swlora.models.tokenizer_folder import check_added_tokens


class PanicException(BaseException):
    """As Rust's libraries raise it: no Exception."""


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "copy"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_skeleton(ModelSpec(name=str(folder), dtype="float32"))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def changed(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes))


def test_too_many_added_tokens(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_folder, "MAX_ADDED_TOKENS", 9)
    check_added_tokens(folder)
    many = {f"<{i}>": i for i in range(10)}
    for name, changes in {
        "special_tokens_map.json": {"additional_special_tokens": list(many)},
        "added_tokens.json": many,
        "tokenizer_config.json": {"added_tokens_decoder": many},
        "tokenizer.json": {"added_tokens": list(many)},
    }.items():
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        changed(folder / name, **changes)
        assert refusal(folder) == (
            f"{folder / name} adds 10 tokens to its vocabulary; 9 is the most"
        )
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)


def test_a_file_that_is_too_large_or_damaged(folder, monkeypatch):
    (folder / "tokenizer.json").write_text("[" * 200 + "]" * 200)
    assert f"{folder / 'tokenizer.json'} cannot be read: it is deeper than" in refusal(folder)
    monkeypatch.setattr(tokenizer_folder, "MAX_FILE_BYTES", 100)
    assert "tokenizer.json cannot be read: it is longer than 100 bytes" in refusal(folder)


def panics(*_args: Any, **_options: Any) -> None:
    raise PanicException("called `Option::unwrap()` on a `None` value")


def test_a_panic_while_it_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panics)
    assert f"the tokenizer of {folder} cannot be loaded: PanicException: called" in refusal(folder)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
def test_what_else_is_no_exception_passes(exception, folder, monkeypatch):
    def interrupted(*_args: Any, **_options: Any) -> None:
        raise exception

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(exception):
        load_skeleton(ModelSpec(name=str(folder), dtype="float32"))


def test_a_panic_on_a_text(monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "somebody/model"
    monkeypatch.setattr(type(tokenizer), "__call__", panics)
    with pytest.raises(UserError, match="tokenizer of somebody/model fails on a text: Panic"):
        token_ids(["a"], tokenizer, special=False)


def test_a_panic_on_a_piece(monkeypatch):
    class Core:
        encode_batch_fast = staticmethod(panics)

    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "somebody/model"
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Core())
    with pytest.raises(UserError, match="tokenizer of somebody/model fails on a text: Panic"):
        piece_ids(["a"], tokenizer)
