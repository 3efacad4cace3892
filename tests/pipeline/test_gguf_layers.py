"""Layers of super weights in a large .gguf file: its weights are dequantised from first to last."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.gguf_files import SIZES, write_gguf
from tests.support.models import MakeModel
from tests.support.small_runs import make_spec, same_weights
from tests.support.whole_jobs import StopsIn, resume, run_in

from swlora import pipeline
from swlora.config import RunSpec
from swlora.estimate import estimate_training
from swlora.job import Job
from swlora.models import gguf_frozen
from swlora.progress import Silent
from swlora.recovery import recover
from swlora.run_record import DryRecord

pytestmark = pytest.mark.usefixtures("no_drawings")


@pytest.fixture
def spec_of(
    make_model: MakeModel,
    tiny_tokenizer: Any,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """A function (method="lora", layers="super") -> a training on a file that counts as large."""
    file = tmp_path / "model.gguf"
    write_gguf(make_model("llama", **SIZES["llama"]), tiny_tokenizer, file, kind="Q4_K")
    monkeypatch.setattr(gguf_frozen, "KEPT_ABOVE_BYTES", 1000)

    def identify(job: Job) -> Any:
        """Stand for a search, which finds the first layer."""
        job.run.write_result({"identify": {"layers": [0], "removal_layers": []}})
        return SimpleNamespace(layers=[0], removal_layers=[])

    monkeypatch.setattr(pipeline, "identify", identify)

    def of(method: str = "lora", layers: str = "super") -> RunSpec:
        changes = {"adapter__layers": layers, "identify__window_tokens": 32}
        return make_spec(file, data, method=method, **changes, train__checkpoint_every_s=1e-9)

    return of


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_a_run_that_found_its_layers_goes_on_with_the_same_weights(
    method: str, spec_of: Any, tmp_path: Path
) -> None:
    run_in(tmp_path / "whole", spec_of(method), "train")
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec_of(method), "train", progress=StopsIn("train", 4))
    recover(stopped, tmp_path / "rescued", Silent())
    resume(stopped)
    assert same_weights(stopped / "adapter", tmp_path / "whole" / "adapter")


@pytest.mark.parametrize(("layers", "is_kept"), [("super", False), ("0", True)])
def test_what_is_foreseen_is_of_the_weights_that_are_trained_on(
    layers: str, is_kept: bool, spec_of: Any, tmp_path: Path
) -> None:
    spec = spec_of(layers=layers)
    foreseen = estimate_training(Job(spec, DryRecord(tmp_path / "run"), Silent()))
    assert ("as they lie there" in foreseen.model) == is_kept
    job = Job(spec, DryRecord(tmp_path / "run"), Silent())
    pipeline.choose_layers(job)
    assert ("as they lie there" in job.loaded.source) == is_kept
    if not is_kept:
        estimate_training(Job(spec_of("full"), DryRecord(tmp_path / "run"), Silent()))
