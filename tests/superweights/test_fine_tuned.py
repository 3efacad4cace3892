"""Before and after fine-tuning: what is found with an adapter is that of a model with its weights.

The planted weight carries a text: layer 1 of a small Llama whose final norm is sharpened.
"""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.adapters import move

from swlora.adapters.methods import adapt
from swlora.adapters.saved import save_adapter
from swlora.config import AdapterSpec, IdentifySpec
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.models.load import LoadedModel
from swlora.progress import Silent
from swlora.result_json import as_json, from_json
from swlora.superweights import fine_tuned, mechanism
from swlora.superweights.ablate import text_loss, zeroed
from swlora.superweights.findings import Identified
from swlora.superweights.fine_tuned import with_fine_tuned
from swlora.superweights.identify import check, identify
from swlora.superweights.report import answer, publish, write_report
from swlora.superweights.rounding import Rounded
from swlora.superweights.sinks import measure_sinks

SPEC = IdentifySpec(
    prompt=["one", "two"], max_candidates=2, controls=2, windows=2, window_tokens=48
)
ADDRESS = WeightAddress(1, "mlp.down_proj", 5, 7)


def planted(make_model: Any) -> Any:
    model = make_model("llama")
    Anatomy(model).weight_view(ADDRESS).fill_(60.0)
    model.model.norm.weight.fill_(10.0)
    return model


@pytest.fixture
def loaded(make_model, tiny_tokenizer) -> LoadedModel:
    model = planted(make_model)
    return LoadedModel(model, tiny_tokenizer, "tiny", None, "a tiny model", (257,))


@pytest.fixture
def adapter(make_model, tmp_path):
    """A function method -> the folder of an adapter of layer 1 whose weights have moved."""

    def save(method: str = "lora", size: float = 0.1):
        adapted = adapt(planted(make_model), AdapterSpec(method=method), [1], seed=1, n_steps=9)
        move(adapted.parameters.values(), size)
        adapted.finish()
        save_adapter(adapted.model, tmp_path / method, {})
        return tmp_path / method

    return save


def compared(loaded: LoadedModel, folder: Any, **changes: Any) -> Identified:
    spec = SPEC.model_copy(update=changes)
    windows = check(loaded, spec)
    before = identify(loaded, spec, windows, seed=0)
    return with_fine_tuned(before, loaded, folder, spec, windows, seed=0, progress=Silent())


def test_both_are_what_each_model_is_by_itself(loaded, adapter, make_model, weights_sha256):
    folder, before = adapter(), weights_sha256(loaded.model)
    found = compared(loaded, folder)
    assert weights_sha256(loaded.model) == before
    assert found.layers == [1] and found.mechanism is not None
    tuned = found.fine_tuned
    assert tuned is not None and tuned.adapter == str(folder)
    assert replace(found, fine_tuned=None) == identify(loaded, SPEC, seed=0)
    # The same adapter, merged by PEFT
    from peft import PeftModel

    merged = PeftModel.from_pretrained(planted(make_model), str(folder)).merge_and_unload().eval()
    windows = check(loaded, SPEC)
    assert tuned.after.perplexity == pytest.approx(text_loss(merged, windows).perplexity, rel=1e-4)
    (moved,) = [m for m in tuned.weights if m.address == ADDRESS]
    assert moved.weight_before == 60
    assert moved.weight_after == pytest.approx(float(Anatomy(merged).weight_view(ADDRESS)))
    assert moved.weight_after != 60
    for model, ratio in ((loaded.model, moved.ratio_before), (merged, moved.ratio_after)):
        base = text_loss(model, windows).nats_per_token
        with zeroed(Anatomy(model), [ADDRESS]):
            rise = text_loss(model, windows).nats_per_token - base
        assert ratio == pytest.approx(math.exp(rise), rel=1e-3)
    assert tuned.sinks_before == measure_sinks(Anatomy(loaded.model), windows)
    expected = measure_sinks(Anatomy(merged), windows).mass
    assert tuned.sinks_after.mass == pytest.approx(expected, rel=1e-4)
    assert [(m.prompt, m.has_bos) for m in tuned.activations] == [
        (prompt, bos) for prompt in ("one", "two") for bos in (False, True)
    ]
    assert [m.before for m in tuned.activations] == [s.activation for s in found.search.settings]
    again = from_json(Identified, json.loads(json.dumps(as_json(found), allow_nan=False)))
    assert as_json(again) == as_json(found)


def test_a_weight_that_is_no_candidate_any_more_is_measured_all_the_same(
    loaded, adapter, monkeypatch
):
    """Where the search with the adapter finds another weight alone, both stand in the table."""
    other = WeightAddress(0, "mlp.down_proj", 3, 2)
    found = compared(loaded, adapter())
    real = fine_tuned.identify

    def elsewhere(*given: Any, **settings: Any) -> Identified:
        result = real(*given, **settings)
        candidate = next(c for c in result.candidates if c.address == ADDRESS)
        seen = replace(candidate.seen, address=other)
        proof = replace(candidate.proof, address=other)
        return replace(result, candidates=(replace(candidate, seen=seen, proof=proof),))

    monkeypatch.setattr(fine_tuned, "identify", elsewhere)
    moved = {m.address: m for m in compared(loaded, adapter()).fine_tuned.weights}
    assert list(moved) == [ADDRESS, other]
    expected = next(m for m in found.fine_tuned.weights if m.address == ADDRESS)
    assert moved[ADDRESS].verdict_after is None
    assert moved[ADDRESS].ratio_after == pytest.approx(expected.ratio_after, rel=1e-5)
    assert moved[ADDRESS].weight_after == expected.weight_after
    assert moved[other].verdict_before is None
    assert moved[other].weight_before == float(Anatomy(loaded.model).weight_view(other))


def test_the_report_shows_both_side_by_side(loaded, adapter, tmp_path):
    folder = adapter()
    result = publish(compared(loaded, folder, deep=True), tmp_path / "run", tmp_path / "a.png")
    text = (tmp_path / "run" / "superweights.md").read_text()
    for title in (
        "Attention on the first position",
        "A constant in place of the weight",
        "Rounded weights",
        "Text at every dose",
        "Before and after fine-tuning",
    ):
        assert text.count(f"\n## {title}\n") == 1
    (moved,) = [m for m in result.fine_tuned.weights if m.address == ADDRESS]
    row = next(line for line in text.splitlines() if line.startswith(f"| {ADDRESS} | 60.0000 |"))
    assert f"| {moved.weight_after:.4f} |" in row
    said = answer(result)
    assert f"with the adapter in {folder}: layers with a verified super weight: 1" in said
    assert any(
        line.startswith(f"the product of {ADDRESS} held at its mean: ratio ") for line in said
    )
    intact, at_zero = result.mechanism.sinks.mass[2], result.mechanism.weights[0].sinks.mass[2]
    assert (
        f"attention on the first position, mean over layers 2 to 2: {intact:.2f}; "
        f"with {ADDRESS} at zero {at_zero:.2f}"
    ) in said
    assert intact != at_zero and result.mechanism.sinks.mass[:2] == pytest.approx(
        result.mechanism.weights[0].sinks.mass[:2]
    )
    without = replace(result, mechanism=replace(result.mechanism, dose_texts=()))
    publish(without, tmp_path / "other", tmp_path / "a.png")
    assert "None: no prompt leaves room" in (tmp_path / "other" / "superweights.md").read_text()
    assert (tmp_path / "run" / "superweights-sinks.png").read_bytes().startswith(b"\x89PNG")
    rounding = result.mechanism.rounding
    assert len(rounding) == 6 and f"| int4 | block | {rounding[-1].ratio:.2f} |" in text
    doses = {t.scale: t for t in result.mechanism.dose_texts if t.prompt == "one"}
    assert doses[1.0].same_tokens == doses[1.0].n_tokens
    assert len(result.mechanism.dose_texts) == 20


def test_each_ratio_stands_under_its_own_name(loaded, adapter, tmp_path):
    found = compared(loaded, adapter())
    of, *others = found.mechanism.weights
    of = replace(of, mean=replace(of.mean, ratio_everywhere=7.25, ratio_by_size=1.5))
    rounded = Rounded(bits=4, group="block", ratio=9.0, ratio_held=1.25)
    mechanism = replace(found.mechanism, weights=(of, *others), rounding=(rounded,))
    moved = [replace(m, ratio_before=11.0, ratio_after=2.0) for m in found.fine_tuned.weights]
    tuned = replace(found.fine_tuned, weights=tuple(moved))
    marked = replace(found, mechanism=mechanism, fine_tuned=tuned)
    write_report(marked, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| everywhere | by size |" in text and "| 7.25 | 1.50 |" in text
    assert "| all rounded | held out |" in text and "| int4 | block | 9.00 | 1.25 |" in text
    assert "| ratio before | after |" in text and "| 11.00 | 2.00 |" in text
    said = "\n".join(answer(marked))
    assert "ratio 7.25 with one mean for all positions, 1.50 with one for those" in said
    assert "its ratio from 11.00 to 2.00" in said


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (fine_tuned, "identify"),
        (fine_tuned, "measure_sinks"),
        (mechanism, "measure_sinks"),
        (mechanism, "restore_mean"),
        (mechanism, "measure_rounding"),
        (mechanism, "dose_texts"),
    ],
)
def test_the_model_is_whole_after_an_error_anywhere(
    owner, name, loaded, adapter, monkeypatch, weights_sha256
):
    before, folder = weights_sha256(loaded.model), adapter()
    real, states = getattr(owner, name), []

    def fails(*given: Any, **settings: Any) -> Any:
        states.append(weights_sha256(loaded.model))
        if states[-1] != before:  # the adapter is in, or a weight is zero
            raise KeyboardInterrupt
        return real(*given, **settings)

    monkeypatch.setattr(owner, name, fails)
    if name == "measure_sinks" and owner is fine_tuned:  # needed where nothing is proved
        monkeypatch.setattr(fine_tuned, "_proven", lambda _: [])
        monkeypatch.setattr("swlora.superweights.identify.measure_mechanism", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        compared(loaded, folder, deep=True)
    assert states[-1] != before
    assert weights_sha256(loaded.model) == before
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_an_adapter_of_another_model(loaded, make_model, tmp_path):
    wide = make_model("llama", intermediate_size=44)
    adapted = adapt(wide, AdapterSpec(), [1], seed=1, n_steps=9)
    save_adapter(adapted.model, tmp_path / "wide", {})
    with pytest.raises(UserError, match="it belongs to another model"):
        compared(loaded, tmp_path / "wide")


def test_nothing_is_measured_where_nothing_is_proved(make_model, tiny_tokenizer, tmp_path):
    loaded = LoadedModel(make_model("llama"), tiny_tokenizer, "t", None, "a model", (257,))
    heard: list[str] = []

    class Heard(Silent):
        def say(self, message: str) -> None:
            heard.append(message)

    spec = SPEC.model_copy(update={"deep": True})
    result = identify(loaded, spec, progress=Heard())
    assert result.mechanism is None and "mechanism" not in as_json(result)
    assert heard == ["no weight is proved: there is nothing that --deep could measure"]
    publish(result, tmp_path, tmp_path / "a.png")
    text = (tmp_path / "superweights.md").read_text()
    assert "Not measured: no weight is proved." in text
    assert not (tmp_path / "superweights-sinks.png").exists()
    assert torch.is_inference_mode_enabled() is False
