"""The loss of English text: what plain transformers gives, measured once for an untouched model."""

import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.adapters import attach, randomise
from tests.support.models import MakeModel

from swlora.config import AdapterSpec
from swlora.evaluation import english
from swlora.evaluation.english import N_WINDOWS, english_loss, untouched_english_loss


def adapted(model: Any) -> Any:
    peft_model = attach(model, AdapterSpec(rank=2), [0, 2], seed=1).eval()
    randomise(peft_model, 0.1)
    return peft_model


@pytest.mark.parametrize("puts_bos", [False, True])
def test_english_is_predicted_token_by_token(
    make_model: MakeModel,
    tiny_tokenizer: Any,
    bos_tokenizer: Callable[[], Any],
    puts_bos: bool,
) -> None:
    """Windows of the shipped text, as long as the model's context, the adapter's part included."""
    model, tokenizer = adapted(make_model("llama")), bos_tokenizer() if puts_bos else tiny_tokenizer
    text = resources.files("swlora.superweights").joinpath("english.txt").read_text("utf-8")
    n = 256 - puts_bos
    ids = torch.tensor(list(text.encode())[: N_WINDOWS * n]).view(N_WINDOWS, n)
    if puts_bos:
        ids = torch.cat([torch.full((N_WINDOWS, 1), 256), ids], dim=1)
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids).logits.double(), dim=-1)[:, :-1]
    expected = -float(log_p.gather(-1, ids[:, 1:, None]).sum())
    found = english_loss(model, tokenizer)
    assert found.n_tokens == N_WINDOWS * 255
    assert found.sum_nats == pytest.approx(expected, rel=1e-5)
    with model.disable_adapter():
        assert english_loss(model, tokenizer).sum_nats != pytest.approx(expected, rel=1e-3)


# The cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "english"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record every measurement; the list grows where the cache did not do."""
    runs, measure = [], english._measured
    monkeypatch.setattr(english, "_measured", lambda *a: runs.append(a) or measure(*a))
    return runs


def test_an_untouched_model_is_measured_once(
    make_model: MakeModel, tiny_tokenizer: Any, cache: Path, measured: list[Any]
) -> None:
    said: list[str] = []
    first = untouched_english_loss(make_model("llama"), tiny_tokenizer, "tiny", said.append)
    assert first == english_loss(make_model("llama"), tiny_tokenizer)
    (path,) = cache.iterdir()
    values = json.loads(path.read_text())
    assert (values["for"], values["sum_nats"]) == ("tiny", first.sum_nats)
    os.utime(path, (0, 0))
    again = untouched_english_loss(make_model("llama"), tiny_tokenizer, "tiny", said.append)
    assert again == first
    assert len(measured) == 2
    assert path.stat().st_mtime > 0  # which says that it was used
    assert said == []


def test_another_model_dtype_text_or_version_is_measured_anew(
    make_model: MakeModel,
    tiny_tokenizer: Any,
    bos_tokenizer: Callable[[], Any],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_weight = make_model("llama")
    one_weight.get_input_embeddings().weight[3, 5] += 1
    cases = [
        (make_model("llama"), tiny_tokenizer),
        (one_weight, tiny_tokenizer),
        (make_model("llama").to(torch.bfloat16), tiny_tokenizer),
        (make_model("llama", rms_norm_eps=1e-2), tiny_tokenizer),
        (make_model("llama"), bos_tokenizer()),
    ]
    for n, (model, tokenizer) in enumerate(cases, start=1):
        found = untouched_english_loss(model, tokenizer, "tiny", pytest.fail)
        assert found == english_loss(model, tokenizer)
        assert len(list(cache.iterdir())) == n
    monkeypatch.setattr(english, "package_versions", lambda: {"torch": "another"})
    untouched_english_loss(*cases[0], "tiny", pytest.fail)
    assert len(list(cache.iterdir())) == len(cases) + 1


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"sum_nats": NaN, "n_tokens": 9}', '{"sum_nats": 1, "n_tokens": 0}']
)
def test_a_damaged_file_is_measured_anew(
    damage: str, make_model: MakeModel, tiny_tokenizer: Any, cache: Path
) -> None:
    model = make_model("llama")
    expected = untouched_english_loss(model, tiny_tokenizer, "tiny", pytest.fail)
    (path,) = cache.iterdir()
    path.write_text(damage)
    assert untouched_english_loss(model, tiny_tokenizer, "tiny", pytest.fail) == expected
    assert json.loads(path.read_text())["n_tokens"] == expected.n_tokens


def test_a_cache_that_may_only_be_read_is_read(
    make_model: MakeModel,
    tiny_tokenizer: Any,
    cache: Path,
    measured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = untouched_english_loss(make_model("llama"), tiny_tokenizer, "m", print)

    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert untouched_english_loss(make_model("llama"), tiny_tokenizer, "m", print) == first
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_is_said(
    make_model: MakeModel, tiny_tokenizer: Any, cache: Path
) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    said: list[str] = []
    model = make_model("llama")
    found = untouched_english_loss(model, tiny_tokenizer, "tiny", said.append)
    assert found == english_loss(model, tiny_tokenizer)
    assert len(said) == 1
    assert said[0].startswith("the loss of English text is not kept for later: cannot write ")
