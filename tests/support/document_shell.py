"""A shell that knows what the documents type, and runs it in this process."""

import io
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from tests.support.servers import until

from swlora.cli import main
from swlora.web import server


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of a document; fails where it ends with another code than 0.

    Who is asked types "yes".
    """
    try:
        match shlex.split(line, comments=True):
            case ["swlora", *arguments]:
                _run_with_input("yes\n", arguments, monkeypatch)
            case ["printf", text, "|", "swlora", *arguments]:
                done = subprocess.run(["printf", text], capture_output=True, check=True, text=True)
                _run_with_input(done.stdout, arguments, monkeypatch)
            case ["cd", folder, "&&", "python", "-m", module, *arguments]:
                with chdir(folder), monkeypatch.context() as called:
                    called.setattr(sys, "argv", [module, *arguments])
                    runpy.run_path(f"{module}.py", run_name="__main__")
            case _:
                pytest.fail("nothing runs this line, and no table says why it is not run")
    except SystemExit as end:
        assert not end.code, f"it ended with code {end.code}"


def _run_with_input(text: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as typed:
        typed.setattr(sys, "stdin", io.StringIO(text))
        main(arguments)


def serve_for_a_visit(monkeypatch: pytest.MonkeyPatch, visit: Callable[[str], None]) -> None:
    """Let `swlora serve` take a free port, be visited at its address, and end."""
    listen = server.listening_socket

    class Visited(server.Server):
        def run(self, sockets: Any = None) -> None:
            address = f"http://{server.shown_address(sockets[0])}"
            with ThreadPoolExecutor(1) as visitor:
                visited = visitor.submit(self._be_visited, address)
                super().run(sockets=sockets)
            visited.result()

        def _be_visited(self, address: str) -> None:
            try:
                until(lambda: self.started)
                visit(address)
            finally:
                self.should_exit = True

    monkeypatch.setattr(server, "listening_socket", lambda host, _port: listen(host, 0))
    monkeypatch.setattr(server, "Server", Visited)


def launch(line: str, folder: Path) -> None:
    """Run a line that begins with torchrun, in processes of its own."""
    _, *arguments = shlex.split(line, comments=True)
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
