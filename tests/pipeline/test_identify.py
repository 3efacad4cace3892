"""Super weights through the pipeline: what is measured, drawn, and trained because of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in, same_adapters

from swlora import pipeline
from swlora.errors import UserError
from swlora.job import Job
from swlora.models.anatomy import Anatomy
from swlora.progress import Silent
from swlora.runs import Run
from swlora.superweights import ablate, proof
from swlora.superweights import identify as identification


@pytest.fixture
def layer_1_matters(monkeypatch) -> None:
    """Proofs that say: the candidates of layer 1 are super weights, all others are none."""
    prove = proof.prove

    def judged(*args: Any, **settings: Any) -> proof.Proof:
        found = prove(*args, **settings)
        verdicts = ("super" if of.address.layer == 1 else "none" for of in found.addresses)
        alone = zip(found.addresses, verdicts, strict=True)
        addresses = tuple(replace(of, verdict=verdict) for of, verdict in alone)
        return replace(found, addresses=addresses, joint_proven=found.joint)

    monkeypatch.setattr(proof, "prove", judged)


def test_identify(model_folder, make_model, tiny_tokenizer, rows, tmp_path):
    """Ratios are those of models with one weight less, measured one by one."""
    spec = make_spec(model_folder("gpt2"), rows, identify__max_candidates=4)
    result = run_in(tmp_path / "run", spec, "identify")
    windows = ablate.text_windows(tiny_tokenizer, None, 1, 32)
    intact = ablate.text_loss(make_model("gpt2"), windows).perplexity
    assert result["perplexity"] == pytest.approx(intact, rel=1e-5)
    assert len(result["candidates"]) == 4
    for c in result["candidates"]:
        model = make_model("gpt2")
        weight = Anatomy(model).projection(c["layer"], c["module"]).weight
        assert c["weight"] == weight[c["in_channel"], c["out_channel"]]
        weight[c["in_channel"], c["out_channel"]] = 0
        ablated = ablate.text_loss(model, windows).perplexity
        assert c["perplexity"] == pytest.approx(ablated, rel=1e-5)
        assert c["ratio"] == pytest.approx(ablated / intact, rel=1e-5)
    assert len(result["modules"]) == 12
    folder = tmp_path / "run"
    assert json.loads((folder / "result.json").read_text()) == {"identify": result}
    assert set(result["figures"].values()) == {
        str(folder / f"superweights{part}.png") for part in ("", "-path", "-dose")
    }
    for path in result["figures"].values():
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert result["report"] == str(folder / "superweights.md")
    assert (folder / "superweights.md").read_text().startswith("# Super weights of ")


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")]
)
def test_figures_of_every_format(name, start, model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows)
    with Run.create(tmp_path / "run", spec, "identify") as run:
        pipeline.identify(Job(spec, run, Silent()), tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


def test_identify_refuses_before_it_works(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("gpt2"), rows, identify__window_tokens=257)
    with pytest.raises(UserError, match="--window-tokens 257 exceeds the model's context of 256"):
        run_in(tmp_path / "a", spec, "identify")
    spec = make_spec(tmp_path / "not-even-looked-for", rows)
    with (
        Run.create(tmp_path / "b", spec, "identify") as run,
        pytest.raises(UserError, match="must end in"),
    ):
        pipeline.identify(Job(spec, run, Silent()), tmp_path / "a.xyz")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_super_trains_the_layers_that_were_verified(
    dtype, layer_1_matters, model_folder, rows, tmp_path, monkeypatch
):
    """Exactly as if they had been listed: identification leaves no trace in the model."""
    read, text_windows = [], ablate.text_windows
    monkeypatch.setattr(ablate, "text_windows", lambda *a: read.append(a) or text_windows(*a))
    changes = {"model__dtype": dtype, "train__epochs": 1}
    folder = model_folder("llama")
    found = run_in(tmp_path / "super", make_spec(folder, rows, adapter__layers="super", **changes))
    listed = run_in(tmp_path / "listed", make_spec(folder, rows, adapter__layers="1", **changes))
    assert found["train"]["layers"] == [1]
    assert len(read) == 1, "the text is read once, by whatever checks it and measures on it"
    assert same_adapters(tmp_path / "super", tmp_path / "listed")
    assert found["eval"]["nll"] == listed["eval"]["nll"]
    saved = json.loads((tmp_path / "super" / "result.json").read_text())
    assert saved["identify"]["layers"] == [1]
    assert {c["verdict"] for c in saved["identify"]["candidates"]} == {"super", "none"}
    assert {"superweights.md", "superweights.png"} <= {
        path.name for path in (tmp_path / "super").iterdir()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_keeps_the_layers_that_were_verified(
    dtype, layer_1_matters, model_folder, rows, tmp_path, monkeypatch
):
    """A search takes minutes, and its answer is in the run's folder already."""
    changes = {"adapter__layers": "super", "model__dtype": dtype}
    spec = make_spec(model_folder("llama"), rows, train__checkpoint_every_s=1e-9, **changes)
    expected = run_in(tmp_path / "whole", spec)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "stopped", spec, progress=StopsIn("train", 6))
    monkeypatch.setattr(identification, "identify", lambda *_, **__: pytest.fail("it looked again"))
    monkeypatch.setattr(identification, "check", lambda *_: pytest.fail("it read the text again"))
    result = resume(tmp_path / "stopped")
    assert result["train"]["layers"] == [1]
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")
    assert result["eval"]["nll"] == expected["eval"]["nll"]


def test_super_without_a_super_weight_says_so(model_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "verdict", lambda *_: "none")
    spec = make_spec(model_folder("llama"), rows, adapter__layers="super")
    with pytest.raises(UserError, match="no super weight was verified"):
        run_in(tmp_path / "run", spec)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["identify"]["layers"] == []
