"""Results as JSON: keys, nesting and None are those that run folders have always had."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS
from tests.support.whole_jobs import DEV, make_spec, run_in

from swlora.result_json import FLAT, IF_ANY, NO_KEY, as_json, from_json, key
from swlora.superweights.findings import Identified
from swlora.superweights.report import answer, rows
from swlora.web.pages.identified_view import identified_view


@dataclass(frozen=True)
class Place:
    layer: int
    channel: int | None


@dataclass(frozen=True)
class Found:
    place: Place = field(metadata=FLAT)
    missing: Place | None = field(metadata=FLAT)
    score: float = field(metadata=key("BLEU"))
    reason: str | None
    best: Path | None = field(metadata=IF_ANY)
    model: Any = field(metadata=NO_KEY)
    parts: tuple[Place, ...]
    by_name: Mapping[str, Path]


def test_what_fields_become() -> None:
    found = Found(
        Place(3, None), None, 0.5, None, None, object(), (Place(1, 2),), {"a": Path("x/y")}
    )
    assert as_json(found) == {
        "layer": 3,
        "channel": None,
        "BLEU": 0.5,
        "reason": None,
        "parts": [{"layer": 1, "channel": 2}],
        "by_name": {"a": "x/y"},
    }
    with pytest.raises(TypeError, match="object has no place in a result"):
        as_json({"a": object()})


TRAINED = """method layers n_trainable adapter_bytes rows batch_size epochs steps planned_steps
learning_rate train_s examples_per_s nodes_per_s tokens_per_s last_loss final_loss
final_loss_steps held_out peak_memory_bytes foreseen adapter loss_figure"""
HELD_OUT = "n_measured first best last best_step n_since_best"
EVALUATED = """BLEU NIST METEOR ROUGE_L CIDEr meteor_reason tokenizer nll nll_sum_nats n_tokens
exact_match token_f1 chrf sacrebleu chrf_signature sacrebleu_signature text_intervals
nll_per_row n_rows scale intervals bootstrap english_perplexity_before english_perplexity
english_sum_nats
english_n_tokens english_windows_begin_with_bos n_prompts split decode data predictions
has_official_scores"""
IDENTIFIED = """model model_id model_revision dtype device prompts text text_tokens_sha256
n_windows window_tokens windows_begin_with_bos n_controls seed thresholds packages prompt tokens
perplexity control_windows bootstrap layers removal_layers candidates joint joint_proven search
known path dose_curve generations modules residual figure figures report"""
ADDRESS = "layer module out_channel in_channel"
EFFECT = """perplexity ratio interval largest_control effect_nats control_effects_nats verdict"""
CANDIDATE = f"""{ADDRESS} weight input_value output_value token contribution contribution_share
bias_share persistence round mean_contribution agreement {EFFECT} leave_one_out_ratio controls"""
PARTS = {
    "joint": f"addresses {EFFECT}",
    "search": "outcome rounds settings",
    "path": f"name {ADDRESS} token intact ablated others",
    "dose_curve": f"name {ADDRESS} points",
    "generations": f"name {ADDRESS} texts",
    "thresholds": "super strong control_factor massive_ratio",
    "bootstrap": "draws block_tokens",
}


def keys(result: Mapping[str, Any]) -> set[str]:
    return set(result)


def test_what_a_run_folder_holds(model_folder, tmp_path, monkeypatch, no_java) -> None:
    """The keys as they were when results were dictionaries, and a block of the data."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    data = write_rows(tmp_path / "a.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", DEV)
    spec = make_spec(model_folder("llama"), data, data__english=True, train__max_steps=2)
    run_in(tmp_path / "run", spec)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert keys(result) == {"data", "train", "eval"}
    of_the_clock = {"busy_share"}  # there after half a second of steps
    assert keys(result["train"]) - of_the_clock == set(TRAINED.split())
    assert keys(result["train"]["held_out"]) == set(HELD_OUT.split())
    evaluated = result["eval"]
    assert keys(evaluated) == set(EVALUATED.split())
    assert keys(evaluated["bootstrap"]) == {"draws", "seed", "confidence"}
    assert evaluated["decode"] == spec.decode.model_dump(mode="json")


@pytest.fixture(scope="module")
def found(model_folder, tmp_path_factory) -> dict[str, Any]:
    """What result.json holds of an identification."""
    folder = tmp_path_factory.mktemp("identified")
    spec = make_spec(model_folder("llama"), (folder / "a", folder / "b"))
    changes = {"controls": 2, "max_candidates": 2, "prompt": ["hello there"]}
    spec = spec.model_copy(update={"identify": spec.identify.model_copy(update=changes)})
    run_in(folder / "run", spec, "identify")
    return json.loads((folder / "run" / "result.json").read_text())["identify"]  # type: ignore[no-any-return]


def test_what_an_identification_leaves(found: dict[str, Any]) -> None:
    assert keys(found) == set(IDENTIFIED.split())
    assert all(keys(candidate) == set(CANDIDATE.split()) for candidate in found["candidates"])
    for name, expected in PARTS.items():
        assert keys(found[name]) == set(expected.split()), name
    settings, activation = found["search"]["settings"], "layer token channel value ratio"
    said = "prompt has_bos is_massive activation removal_layers"
    assert keys(settings[0]) == set(said.split())
    assert keys(settings[0]["activation"]) == set(activation.split())
    assert keys(found["modules"][0]) == {"layer", "module", "input", "output"}
    again = from_json(Identified, found)
    assert as_json(again) == found
    view = identified_view(found)
    assert view is not None and view.candidates == rows(again)
    assert [line.lower() for line in view.sentences] == [line.lower() for line in answer(again)]
    with pytest.raises(KeyError, match="search"):
        from_json(Identified, {name: found[name] for name in found if name != "search"})
    with pytest.raises(ValueError, match="valid"):
        from_json(Identified, found | {"candidates": {"a": 1}})


USED = {"candidates", "layers", "removal_layers", "joint", "joint_proven", "search", "known"}


def test_a_page_shows_what_an_older_version_found(found: dict[str, Any]) -> None:
    """A key that older versions did not write costs nothing but what is made of it."""
    whole = identified_view(found)
    assert whole is not None and whole.sentences and whole.candidates
    for missing in set(IDENTIFIED.split()) - USED - {"thresholds"}:
        view = identified_view({name: found[name] for name in found if name != missing})
        assert view is not None, missing
        assert (view.sentences, view.candidates) == (whole.sentences, whole.candidates), missing
