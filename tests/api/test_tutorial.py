"""The tutorial runs in a kernel of Jupyter as a person runs it, and does what it says."""

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from swlora.runs import read_result, read_run

TUTORIAL = Path(__file__).resolve().parents[2] / "examples" / "tutorial.ipynb"


def test_it_is_kept_without_what_a_run_printed() -> None:
    cells = json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
def test_it_runs(builtin_dir, tmp_path, tmp_path_factory, monkeypatch, no_java) -> None:
    cache, sockets = tmp_path / "cache", tmp_path_factory.mktemp("k")
    cache.mkdir()
    (cache / builtin_dir.name).symlink_to(builtin_dir)
    monkeypatch.setenv("SWLORA_CACHE", str(cache))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(sockets))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    kernel = AsyncKernelManager(transport="ipc", ip=str(sockets / "s"))  # no network in tests
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=kernel, timeout=300, resources=where).execute()

    before, after = (read_result(tmp_path / "runs" / name)["eval"] for name in ("before", "after"))
    assert after["nll"] < 0.2 * before["nll"]
    assert before["exact_match"] == 0 and after["exact_match"] > 0.9
    assert read_run(tmp_path / "runs" / "tickets")["status"] == "done"
    assert (tmp_path / "runs" / "tickets" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert (tmp_path / "tickets.gguf").read_bytes()[:4] == b"GGUF"
    said = " ".join(text for cell in notebook.cells for text in outputs(cell))
    assert "trained tokens are" in said  # as swlora data says
    assert "train: 100%" in said or "a callback ended the training" in said  # by themselves
    assert "hardware, high" in said


def outputs(cell: Any) -> list[str]:
    found = cell.get("outputs", [])
    return [out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in found]
