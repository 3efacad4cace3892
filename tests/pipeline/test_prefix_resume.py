"""A killed training that goes on over the prefix cache it left: the bytes of one that was not."""

import shutil
from pathlib import Path

import pytest
from tests.support.models import ModelFolder
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in

from swlora.runs import read_run

pytestmark = pytest.mark.usefixtures("no_drawings", "small_fixed_groups")

NEVER_S, ALWAYS_S = 1e9, 1e-9


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ["prompts", "pairs"])
@pytest.mark.parametrize("checkpoint_s", [NEVER_S, ALWAYS_S], ids=["none", "one a step"])
@pytest.mark.parametrize("step", [2, 7])
def test_steps_that_are_done_again_read_the_states_of_the_first_time(
    model_folder: ModelFolder,
    rows: tuple[Path, Path],
    tmp_path: Path,
    fresh_cache: Path,
    dtype: str,
    order: str,
    checkpoint_s: float,
    step: int,
) -> None:
    """Ended behind a step and before its checkpoint, as by a kill; on the states of both epochs."""
    changes = {
        "adapter__layers": "last:2",
        "adapter__dropout": 0.1,
        "model__dtype": dtype,
        "train__order": order,
        "train__checkpoint_every_s": checkpoint_s,
    }
    spec = make_spec(model_folder("llama"), rows, **changes)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, spec, "train", StopsIn("train", step + 1))
    assert (folder / "checkpoint").exists() is (checkpoint_s == ALWAYS_S)
    resume(folder)
    assert read_run(folder)["resumed"] == 1
    run_in(tmp_path / "warm", spec, "train")
    shutil.rmtree(fresh_cache / "prefix")
    run_in(tmp_path / "cold", spec, "train")
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "cold")
    assert adapter_bytes(tmp_path / "warm") == adapter_bytes(tmp_path / "cold")
