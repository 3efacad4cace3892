"""A study on a real Ray cluster of two nodes: what comes out is what comes out here."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tests.support.data_files import write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: swlora[ray]"
    ),
]
ROWS = [{"prompt": f"prompt {k}\n", "completion": f"answer {k % 7}."} for k in range(300)]
RUNS = [f"runs/{arm}/seed-{seed}" for arm in ("lora", "top") for seed in (0, 1)]


def without_java():
    """The environment without Java, which takes long; every machine has it, or none."""
    folders = os.environ["PATH"].split(os.pathsep)
    bare = [folder for folder in folders if not (Path(folder) / "java").exists()]
    return {**os.environ, "PATH": os.pathsep.join(bare), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def ray_address():
    """The address of a cluster of two nodes."""
    nodes = Path(__file__).with_name("ray_nodes.py")
    process = subprocess.Popen(
        [sys.executable, str(nodes)],
        stdin=-1,
        stdout=-1,
        stderr=-3,
        text=True,
        env=without_java(),
    )
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture
def config(model_folder, tmp_path):
    """A study of two arms and two seeds, in float32."""
    settings = {
        "model": {"name": str(model_folder("llama")), "dtype": "float32", "device": "cpu"},
        "data": {"name": str(write_rows(tmp_path / "rows.jsonl", ROWS)), "eval_prompts": 4},
        "decode": {"max_new_tokens": 4},
        "arms": ["lora", {"name": "top", "layers": "last:1"}],
        "seeds": [0, 1],
        "train": {"batch_size": 4},
        "rate": {"grid": [0.01]},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def start(config):
    """A function (name, *arguments) -> the process of a study in that folder beside its file."""

    def begin(name, *arguments):
        command = [sys.executable, "-m", "swlora", "compare", "--config", config.name]
        return subprocess.Popen(
            [*command, "--output", name, *arguments],
            cwd=config.parent,  # Ray's workers have folders of their own
            env=without_java(),
            stdout=-1,
            stderr=-2,
            text=True,
        )

    return begin


def results(folder):
    """What a study says of its arms, without what depends on the clock or the machine."""
    found = json.loads((folder / "results.json").read_text())["arms"]
    names = ("name", "seeds", "layers", "n_trainable", "nll", "bleu", "intervals", "spread")
    return [{name: arm[name] for name in names} for arm in found]


def adapters(folder):
    return [(folder / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in RUNS]


def kill_worker_of(run, within_s):
    """Kill the process that keeps watch over a run, when it trains."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        for process in psutil.process_iter():
            try:
                if (run / "checkpoint").exists() and str(run) in process.cmdline():
                    process.parent().kill()
                    return
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError(f"no process of {run}")


def test_a_study_on_two_nodes_is_the_study_here_even_where_a_worker_is_killed(
    start, ray_address, tmp_path
):
    said, _ = start("here").communicate(timeout=400)
    assert "Traceback" not in said
    there = start("there", "--ray", ray_address, "--ray-cpus", "1")
    kill_worker_of(tmp_path / "there" / RUNS[0], within_s=120)
    said, _ = there.communicate(timeout=400)
    assert there.returncode == 0, said
    assert "2 nodes, 1 CPU a run" in said
    assert f"{RUNS[0]} was lost on" in said
    assert f"{RUNS[0]} goes on on" in said
    assert results(tmp_path / "there") == results(tmp_path / "here")
    assert adapters(tmp_path / "there") == adapters(tmp_path / "here")
    facts = json.loads((tmp_path / "there" / "study.json").read_text())
    assert facts["status"] == "done"
    assert all(facts["runs"][run]["host"] for run in RUNS)
    assert not (tmp_path / "there" / ".cache").exists()
    again, _ = start("there", "--ray", ray_address).communicate(timeout=200)
    assert " begins on " not in again


def test_an_address_at_which_nothing_answers_is_one_line_soon(start):
    began_s = time.monotonic()
    process = start("nowhere", "--ray", "127.0.0.1:9")
    said, _ = process.communicate(timeout=120)
    assert time.monotonic() - began_s < 60
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("swlora: --ray 127.0.0.1:9: no Ray cluster answers")
