"""Short child processes whose result is a JSON file: looks at data, and estimates.

One runs at a time, and another one takes its place: whoever asks last is waiting. They end with the
server. Nothing is computed in the server's own process, whose texts go on.
"""

import os
import subprocess
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swlora.bounded_read import UnreadableError, read_json_object
from swlora.errors import RunFailedError
from swlora.study.one_process import LOG
from swlora.web.training.worker import WITHOUT_KEY, last_line

TIMEOUT_S = 300.0
ENDING_S = 10.0
MAX_KEPT = 16
MAX_RESULT_BYTES = 8 << 20


@dataclass
class Errand:
    """What was asked for: its result when it is there, or why there is none."""

    child: "subprocess.Popen[bytes]" = field(repr=False)
    result: dict[str, Any] | None = None
    problem: str = ""
    is_over: bool = False
    is_ending: bool = False

    def end(self) -> None:
        """Have it end without a result; it says so itself."""
        self.is_ending = True
        self.child.terminate()

    def serves(self, *, keeps_result: bool) -> bool:
        """Say whether who asks for it again gets an answer of it."""
        if self.is_over:
            return keeps_result and self.result is not None
        return not self.is_ending


class Errands:
    """Errands by what they were asked, the last ones kept."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._known: OrderedDict[str, Errand] = OrderedDict()

    def ask(
        self, key: str, command: Callable[[Path], list[str]], *, keeps_result: bool = True
    ) -> None:
        """Start `command(file of the result)`, unless it is under way, or its result is kept.

        What else is under way ends: it was asked for before. Raises RunFailedError where no
        process can be started.
        """
        with self._mutex:
            known = self._known.get(key)
            if known and known.serves(keeps_result=keeps_result):
                return
            for other in self._known.values():
                other.end()
            child, folder = _start(command)
            errand = self._known[key] = Errand(child)
            self._known.move_to_end(key)
            while len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)
        threading.Thread(target=self._wait, args=(errand, folder), daemon=True).start()

    def of(self, key: str) -> Errand | None:
        """Return what became of an errand; None where it was not asked for, or is forgotten."""
        with self._mutex:
            return self._known.get(key)

    def end(self) -> None:
        """End what is under way."""
        with self._mutex:
            for errand in self._known.values():
                errand.end()

    def _wait(self, errand: Errand, folder: "tempfile.TemporaryDirectory[str]") -> None:
        child = errand.child
        with folder:
            try:
                code = child.wait(self._timeout_s)
                errand.result, errand.problem = _outcome(Path(folder.name), code)
            except subprocess.TimeoutExpired:
                child.terminate()
                errand.problem = f"it took more than {self._timeout_s:.0f} s and was ended"
                try:
                    child.wait(ENDING_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
            errand.is_over = True


def _start(
    command: Callable[[Path], list[str]],
) -> "tuple[subprocess.Popen[bytes], tempfile.TemporaryDirectory[str]]":
    """Start a child; return it and the folder of its result and its log."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="swlora-errand-")
    except OSError as error:
        raise RunFailedError(f"it cannot be started: {error.strerror}") from error
    try:
        with (Path(folder.name) / LOG).open("wb") as said:
            child = subprocess.Popen(
                command(Path(folder.name) / "result.json"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env={**os.environ, **WITHOUT_KEY},
                start_new_session=True,  # Ctrl-C reaches the server alone
            )
    except OSError as error:
        folder.cleanup()
        raise RunFailedError(f"it cannot be started: {error.strerror}") from error
    return child, folder


def _outcome(folder: Path, code: int) -> tuple[dict[str, Any] | None, str]:
    """Return (the result, "") of a child that ended, or (None, why there is none)."""
    if code == 0:
        try:
            path = folder / "result.json"
            return read_json_object(path, max_bytes=MAX_RESULT_BYTES, follow_links=False), ""
        except UnreadableError as error:
            return None, f"its result cannot be shown: {error}"
    if code < 0:
        return None, "it was ended before it was done; ask again"
    return None, last_line(folder) or "it failed"
