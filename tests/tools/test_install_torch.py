"""Which build of PyTorch is installed where; pip itself is real, its index is on this machine."""

import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools import install_torch

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
VERSION = "9.9.9+cpu"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """The address of an index with a wheel of torch for every Python."""
    folder = tmp_path / "index" / "torch"
    folder.mkdir(parents=True)
    wheel, about = f"torch-{VERSION}-py3-none-any.whl", f"torch-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / wheel, "w") as file:
        file.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}\n"
        )
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    (folder / "index.html").write_text(f"<a href='{wheel}'>{wheel}</a>")
    handler = partial(Quiet, directory=str(folder.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux without a GPU, whatever this machine is."""
    monkeypatch.setattr(install_torch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install_torch, "sees_nvidia_gpu", lambda: False)
    monkeypatch.delenv("TORCH_INDEX", raising=False)


@pytest.fixture
def dry_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pip says in this file what it would install, and installs nothing."""
    report = tmp_path / "report.json"
    own = {"DRY_RUN": "1", "IGNORE_INSTALLED": "1", "REPORT": str(report), "QUIET": "1"}
    for name, value in {**own, "RETRIES": "0", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("FIND_LINKS", "EXTRA_INDEX_URL", "CONSTRAINT"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    return report


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What pip is asked for, in place of asking it."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(install_torch, "install", lambda *asked: calls.append(asked) or 0)
    return calls


def test_the_cpu_build_where_no_gpu_is(linux, index, dry_pip, monkeypatch, capsys) -> None:
    monkeypatch.setattr(install_torch, "CPU_INDEX", index)
    assert install_torch.main(["torch"]) == 0
    (found,) = json.loads(dry_pip.read_text())["install"]
    assert found["metadata"]["version"] == VERSION
    assert found["download_info"]["url"].startswith(index)
    assert capsys.readouterr().out.startswith("no NVIDIA GPU here: the CPU build of PyTorch")


def test_an_index_without_a_fitting_build_is_no_failure(
    linux, index, dry_pip, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(install_torch, "CPU_INDEX", index)
    assert install_torch.main(["torch<9"]) == 0
    assert not dry_pip.exists()
    assert "installing the default one" in capsys.readouterr().out
    monkeypatch.setenv("TORCH_INDEX", index)  # but one that was named is used or refused
    assert install_torch.main(["torch<9"]) != 0


def test_an_index_that_does_not_answer_costs_seconds(linux, monkeypatch, pip_calls, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "timed out" in str(install_torch.why_unreachable(address, limit_s=0.1))
    monkeypatch.setattr(install_torch, "CPU_INDEX", address)  # closed by now
    assert install_torch.main(["torch"]) == 0
    assert pip_calls == []
    said = capsys.readouterr().out
    assert "does not answer (" in said and "CUDA libraries of gigabytes" in said


@pytest.mark.parametrize("answer", [b"", b"no such host\r\n\r\n"])
def test_whatever_a_proxy_answers_is_no_index(answer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def once() -> None:
            client, _ = proxy.accept()
            client.recv(4096)
            client.sendall(answer)
            client.close()

        threading.Thread(target=once, daemon=True).start()
        assert install_torch.why_unreachable(f"http://127.0.0.1:{proxy.getsockname()[1]}")


def test_a_page_that_is_missing_is_no_index(index) -> None:
    assert install_torch.why_unreachable(index) is None
    assert install_torch.why_unreachable(f"{index}/elsewhere") == "File not found"


@pytest.mark.parametrize(
    ("system", "gpu", "named", "asked"),
    [
        ("Linux", True, None, []),
        ("Darwin", False, None, []),
        ("Linux", False, "", []),
        ("Linux", True, "http://rocm", [("http://rocm", ["torch"])]),
        ("Linux", False, "http://rocm", [("http://rocm", ["torch"])]),
    ],
)
def test_where_the_default_stays(
    system, gpu, named, asked, linux, monkeypatch, pip_calls, capsys
) -> None:
    def no_probe(*_: object) -> str:
        raise AssertionError("nobody asked for the CPU build")

    monkeypatch.setattr(install_torch, "why_unreachable", no_probe)
    monkeypatch.setattr(install_torch.platform, "system", lambda: system)
    monkeypatch.setattr(install_torch, "sees_nvidia_gpu", lambda: gpu)
    if named is not None:
        monkeypatch.setenv("TORCH_INDEX", named)
    assert install_torch.main(["torch"]) == 0
    assert pip_calls == asked
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("device", "nvidia_smi", "seen"),
    [
        ("nvidia0", None, True),
        ("nvidiactl", None, False),  # the driver without a card
        (None, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", True),
        (None, "echo 'No devices were found'; exit 6", False),
        (None, "echo", False),
        (None, None, False),
    ],
)
def test_a_gpu_is_seen_as_a_device_or_by_nvidia_smi(device, nvidia_smi, seen, tmp_path) -> None:
    dev, tools = tmp_path / "dev", tmp_path / "bin"
    dev.mkdir()
    tools.mkdir()
    if device:
        (dev / device).touch()
    if nvidia_smi:
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (tools / "nvidia-smi").chmod(0o755)
    assert install_torch.sees_nvidia_gpu(dev, str(tools)) == seen
