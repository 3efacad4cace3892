"""The GPU benchmark, as far as it goes on a CPU."""

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from benchmarks.token_rows import IGNORED, TokenRows
from packaging.requirements import Requirement

from benchmarks import gpu, gpu_models, gpu_peers, gpu_prepare

ROOT = Path(__file__).resolve().parents[2]
CARRIED = {
    requirement.partition("==")[0]
    for requirement in (*gpu_prepare.PACKAGES, *gpu_prepare.PEER_PACKAGES)
}


def test_tests_and_our_own_arm_come_first() -> None:
    for dry in (True, False):
        names = [part.name for part in gpu.parts(dry, Path("x"))]
        assert names[:2] == ["tests", "ours"] and len(set(names)) == len(names)


def names(requirements: Iterable[str]) -> set[str]:
    """What is required where no extra is asked for, by names as they are written in a list."""
    parsed = map(Requirement, requirements)
    needed = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {r.name.lower().replace("_", "-") for r in needed}


@pytest.mark.parametrize("package", sorted(CARRIED))
def test_what_a_carried_package_needs_is_carried_or_there(package: str) -> None:
    """Nothing is resolved on a machine without a network."""
    try:
        needed = names(importlib.metadata.requires(package) or [])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed here")
    assert needed <= CARRIED.union(gpu_prepare.THERE)


def test_what_swlora_needs_is_carried_or_there_or_not_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = CARRIED.union(gpu_prepare.THERE, gpu_prepare.NOT_IMPORTED)
    assert names(project["dependencies"]) <= known


@pytest.mark.slow
def test_tests_and_arm_run_without_what_they_are_said_not_to_import(tmp_path: Path) -> None:
    needed = {*CARRIED, *gpu_prepare.THERE}
    modules = importlib.metadata.packages_distributions()
    refused = [
        module
        for module, packages in modules.items()
        for own in [{name.lower().replace("_", "-") for name in packages}]
        if own.intersection(gpu_prepare.NOT_IMPORTED) and not own & needed
    ]
    assert len(refused) >= len(gpu_prepare.NOT_IMPORTED)
    code = f"""
        import sys
        sys.modules |= dict.fromkeys({refused!r})  # to import one is an ImportError
        from benchmarks import gpu_arm
        import tests.gpu.test_exactness, tests.gpu.test_work, tests.gpu.test_device_clock
        import tests.training.test_loop_resume
        gpu_arm.main()
    """
    options = "ours --device cpu --shape tiny --row-tokens 512 --rows 12 --steps 4 --json"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *options.split(), str(tmp_path / "arm.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "arm.json").read_text())["examples_per_s"] > 0


def test_every_test_on_a_gpu_is_marked_as_one() -> None:
    """`gpu.py` runs those that are marked."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert len(files) >= 3
    unmarked = [f.name for f in files if "\npytestmark = pytest.mark.gpu\n" not in f.read_text()]
    assert not unmarked


def test_a_part_ends_at_its_limit_or_says_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_part.py").write_text("import time; time.sleep(60)")
    (tmp_path / "bad_part.py").write_text("raise SystemExit('a reason')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(name: str, limit_s: float, left_s: float = 60.0) -> str:
        part = gpu.Part(name, [name], limit_s)
        return str(gpu._run(part, left_s, tmp_path, "")["error"])

    assert run("slow_part", 1.0) == "stopped after 1 s: no message"
    assert run("bad_part", 60.0) == "exit code 1: a reason"
    assert run("bad_part", 60.0, left_s=14.0) == "left out: no time was left"


def test_options_that_are_not_known_are_named() -> None:
    def said(*options: str) -> tuple[int, str]:
        command = ["bash", "benchmarks/gpu.sh", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert said("--dry") == (
        2,
        "gpu.sh: no option is called --dry; there are --prepare and --dry-run\n",
    )
    code, text = said("--help")
    assert code == 0 and all(word in text for word in ("--prepare", "--dry-run", "WHEELS", "OUT"))


def test_ratios_compare_rates_and_nodes() -> None:
    ours = {"examples_per_s": 300.0, "nodes_run": 90, "steady_s": 1.0}
    flat = {"examples_per_s": 125.0, "nodes_run": 100, "steady_s": 1.0}
    found = gpu.ratios({"ours": ours, "ours-flat": flat, "trl-packed": {"examples_per_s": 100.0}})
    assert found == {"vs_trl_packed": 3.0, "realised_to_ideal": 0.9}
    assert gpu.ratios({"ours": {"error": "x"}, "trl-packed": {"examples_per_s": 1.0}}) == {}


def test_made_rows_share_prompts_as_e2e_does() -> None:
    rows, what = gpu_models.e2e_rows(None, 2000, 512)
    assert len(rows) == 2000 and what.startswith("made")
    prompts = {tuple(item["input_ids"][: item["labels"].count(IGNORED)]) for item in rows.items()}
    assert 200 < len(prompts) < 280  # 8.65 references each
    assert rows.tokens.max() < 512


def test_packed_rows_have_positions_and_labels_of_their_own() -> None:
    rows = TokenRows.from_parts([[([5, 6], False), ([7], True)], [([8], False), ([9, 3], True)]])
    (batch,) = gpu_peers.packed_batches(rows.items(), 6, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, 9, 3]]
    assert len(list(gpu_peers.packed_batches(rows.items(), 5, "cpu"))) == 2
    sizes = [b["input_ids"].shape for b in gpu_peers.padded_batches(rows.items(), 4, "cpu")]
    assert sizes == [(1, 3), (1, 3)]


def test_saved_rows_are_folded_into_a_smaller_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "rows.npz"
    gpu_models.made_rows(5, 40_000).save(file)
    rows, what = gpu_models.e2e_rows(file, 3, 512)
    assert what == "E2E" and len(rows) == 3 and int(np.max(rows.tokens)) < 512


@pytest.mark.slow
def test_a_dry_run_runs_every_line(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["tests"]["code"] == 0, parts["tests"]
    failed = {name: part["error"] for name, part in parts.items() if "error" in part}
    assert not failed or list(failed) == ["trl-packed"]  # TRL is no dependency of the tests
    assert "realised_to_ideal" in done.stdout
