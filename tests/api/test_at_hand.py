"""A model that is loaded already: evaluated as its files are, and nothing beside it is ignored."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.api_calls import TRAINING

import swlora
from swlora.config import load_spec
from swlora.errors import UserError
from swlora.runs import read_run

HOW = {"max_new_tokens": 4, "eval_prompts": 2, "english": True}


def parts(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the model, and those of the data."""
    return tuple(
        {name: settings[name] for name in names}
        for names in (("model", "dtype", "device"), ("dataset", "eval_file"))
    )


def state(model: Any) -> list[Any]:
    """What an evaluation must leave as it is."""
    modes = [module.training for module in model.modules()]
    return [*modes, *((p.requires_grad, p.sum().item()) for p in model.parameters())]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_is_evaluated_as_the_adapter_in_a_folder(method, settings) -> None:
    model, data = parts(settings)
    settings |= TRAINING | {"method": method}
    if method == "full":
        del settings["rank"]
    trained = swlora.train(**settings, output="../run")
    expected = swlora.evaluate("../run", **model, **data, **HOW)
    assert expected.english.perplexity != pytest.approx(expected.english.perplexity_before)
    loaded = swlora.load("../run", **model)
    loaded.model.train()
    for at_hand in (trained.loaded, loaded):
        before = state(at_hand.model)
        found = swlora.evaluate(model=at_hand, **data, **HOW)
        assert state(at_hand.model) == before
        assert [*found.texts.predictions] == [*expected.texts.predictions]
        assert found.nll == pytest.approx(expected.nll, rel=1e-6)
        assert found.scores == expected.scores
        for name in ("perplexity", "perplexity_before"):
            of_both = [getattr(one.english, name) for one in (found, expected)]
            assert of_both[0] == pytest.approx(of_both[1], rel=1e-5), name
    assert os.listdir() == []


def test_a_base_model_is_evaluated_as_by_its_name(settings) -> None:
    model, data = parts(settings)
    found = swlora.evaluate(model=swlora.load(**model), **data, **HOW)
    expected = swlora.evaluate(**model, **data, **HOW)
    assert (found.nll, found.english, found.scores) == (
        expected.nll,
        expected.english,
        expected.scores,
    )


def test_a_run_of_it_says_which_model_it_was(settings) -> None:
    model, data = parts(settings)
    trained = swlora.train(**settings, **TRAINING)
    swlora.evaluate(model=trained.loaded, **data, max_new_tokens=2, output="../eval")
    facts, spec = read_run(Path("../eval")), load_spec(Path("../eval/config.yaml"), {})
    assert (facts["status"], facts["adapter"]) == ("done", "in memory (lora)")
    assert (spec.model.name, spec.model.dtype, spec.model.device) == tuple(model.values())


def test_a_run_of_the_embedded_model_names_it_as_everywhere(settings, monkeypatch) -> None:
    """Not by its folder in this machine's cache."""
    model, data = parts(settings)
    loaded = swlora.load(**model)
    monkeypatch.setattr("swlora.models.builtin.unpacked_folder", lambda: Path(loaded.name))
    swlora.evaluate(model=loaded, **data, max_new_tokens=2, output="../eval")
    spec = load_spec(Path("../eval/config.yaml"), {})
    assert [read_run(Path("../eval"))["model"], spec.model.name] == ["builtin", "builtin"]


def test_what_would_be_without_effect_beside_it_is_refused(settings) -> None:
    model, data = parts(settings)
    loaded = swlora.load(**model)
    with pytest.raises(UserError, match="loaded already: leave out adapter, device, or give it to"):
        swlora.evaluate("../run", model=loaded, device="cpu", **data)
    assert swlora.generate("a", model=loaded, dtype=None, max_new_tokens=1).prompt == "a"


@pytest.mark.parametrize(
    ("section", "mistake"),
    [
        ("name: gpt2", r"c\.yaml says the model gpt2, and the one that is given is the folder"),
        ("dtype: bfloat16", "says dtype bfloat16, and the model that is given has float32"),
        ("device: cuda", "says device cuda, and the model that is given is on cpu"),
    ],
)
def test_a_file_that_says_another_model_is_refused(section, mistake, settings) -> None:
    model, data = parts(settings)
    loaded, config = swlora.load(**model), Path("c.yaml")
    config.write_text(f"model: {{{section}}}\n")
    with pytest.raises(UserError, match=mistake):
        swlora.generate("a", model=loaded, config=config)
    with pytest.raises(UserError, match=mistake):
        swlora.evaluate(model=loaded, config=config, **data)


def test_a_file_that_says_another_revision_is_refused(settings) -> None:
    model, _ = parts(settings)
    loaded = replace(swlora.load(**model), name="some/model", revision="a" * 40)
    for revision in ("b" * 40, "a" * 40):
        Path("c.yaml").write_text(f"model: {{revision: {revision}}}\n")
        with pytest.raises(UserError, match="revision bbb") if "b" in revision else nullcontext():
            swlora.generate("a", model=loaded, config="c.yaml", max_new_tokens=1)


def test_a_file_that_says_the_same_model_is_taken(settings) -> None:
    """With its other settings, as for a training and for what comes after it."""
    model, _ = parts(settings)
    loaded, link = swlora.load(**model), Path("link")
    link.symlink_to(model["model"])
    for name in (model["model"], "./link"):
        Path("c.yaml").write_text(
            f"model: {{name: {name}, dtype: float32, device: cpu, threads: 1}}\n"
            "decode: {max_new_tokens: 2}\n"
        )
        found = swlora.generate("a", model=loaded, config="c.yaml")
        assert found.text == swlora.generate("a", model=loaded, max_new_tokens=2).text
