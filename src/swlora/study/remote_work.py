"""One run of a study on another machine: an order comes in, messages go out.

An order and its messages are plain values, so that any program can carry them. Where the machine
sees the study's folder, the run works in it, and goes on from its checkpoint. Elsewhere it has a
folder in that machine's temporary one, which lasts as long as the run: what it leaves, without
checkpoints, travels back with the last message, up to SENT_BYTES.

    began     host, machine, load, resumed
    alive     nothing new                        metrics   tail: the end of metrics.jsonl
    ended     code, files by name (where the study's folder is not seen), left_out
    refused   why this machine cannot do it
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from swlora.bounded_read import UnreadableError, read_tail
from swlora.config import load_spec
from swlora.errors import RunFailedError, UserError
from swlora.locks import lock_folder
from swlora.metrics_file import METRICS
from swlora.snapshots import has_snapshot
from swlora.study.folder import machine_facts
from swlora.study.guarded import guarded
from swlora.study.one_process import LOG, Command, child_command, fill_cache, start_process
from swlora.study.plan import Task
from swlora.study.runner import is_over, run_facts
from swlora.versions import package_versions

SENT_BYTES = 256 << 20  # of a run's files, adapter included
LOG_BYTES = 1 << 20
TAIL_BYTES = 4096
LOOK_EVERY_S = 1.0
STOPS_S = 60.0  # how long a run may take to stop after its present step
TOKEN = "token"  # in the study's cache folder: who reads the same one there sees the same folder
NOT_SENT = ("checkpoint", "best")

Message = dict[str, Any]


def order_of(task: Task, config: str, study: Path, token: str, n_threads: int) -> dict[str, Any]:
    """Return the order for a run; `config` is its configuration as YAML."""
    return {
        "task": {"phase": task.phase, "arm": task.arm, "label": task.label, "folder": task.folder},
        "adapter": task.adapter,
        "adapter_files": {},
        "config": config,
        "study": str(study.absolute()),
        "working_folder": str(Path.cwd()),  # settings may have paths that are relative to it
        "token": token,
        "n_threads": n_threads,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that all machines of a study must have alike."""
    python = ".".join(platform.python_version_tuple()[:2])
    java = "there" if shutil.which("java") else "not there"  # METEOR needs it
    return {"python": python, "java": java, **package_versions()}


def look_around(order: Mapping[str, Any]) -> Iterator[Message]:
    """Tell of this machine what an order needs: one message, `seen` or `refused`."""
    problem = _problem(order)
    if problem:
        yield {"kind": "refused", "reason": problem}
        return
    yield {"kind": "seen", "host": platform.node(), "sees_study": _sees_study(order)}


def work_on(order: Mapping[str, Any], command: Command = child_command) -> Iterator[Message]:
    """Do a run, and yield messages while it lasts.

    KeyboardInterrupt and GeneratorExit stop the run's process after its present step.
    """
    problem = _problem(order)
    if problem:
        yield {"kind": "refused", "reason": problem}
        return
    with _study_folder(order) as study, tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.yaml"
        config.write_text(order["config"], encoding="utf-8")
        spec = load_spec(config, {})
        task = Task(**order["task"], spec=spec, adapter=order["adapter"])
        folder, is_own = study / task.folder, study != Path(order["study"])
        folder.mkdir(parents=True, exist_ok=True)
        _wait_until_free(folder)
        facts = run_facts(folder)
        if facts is not None and is_over(facts, task):  # a lost one that came to its end alone
            yield _began(resumed=True)
            code = 0
        else:
            resume = _make_ready(folder, task)
            fill_cache(Path(scratch) / "cache")
            given = Path(order["working_folder"])
            process = start_process(
                guarded(command(task, study, config, resume)),
                folder,
                {"SWLORA_CACHE": str(Path(scratch) / "cache"), **_threads(order["n_threads"])},
                given if given.is_dir() else None,
            )
            yield _began(resumed=resume)
            code = yield from _watch(process, folder if is_own else None)
        files, left_out = _packed(folder, study, Path(order["study"])) if is_own else ({}, [])
        yield {"kind": "ended", "code": code, "files": files, "left_out": left_out}


def _began(*, resumed: bool) -> Message:
    return {
        "kind": "began",
        "host": platform.node(),
        "machine": machine_facts(),
        "load": round(os.getloadavg()[0], 2),
        "resumed": resumed,
    }


def _problem(order: Mapping[str, Any]) -> str | None:
    """Say why this machine cannot do what is ordered, or None."""
    host, own = platform.node(), versions()
    for name, version in order["versions"].items():
        if own.get(name) != version:
            return f"{name} is {own.get(name)} on {host} and {version} here: install the same"
    for what, path in order.get("paths", {}).items():
        if not (Path(order["working_folder"]) / path).exists():
            return f"{host} does not have the {what} {path}: every machine needs it at that path"
    return None


def _sees_study(order: Mapping[str, Any]) -> bool:
    try:
        return bool((Path(order["study"]) / ".cache" / TOKEN).read_text() == order["token"])
    except OSError:
        return False


@contextmanager
def _study_folder(order: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the study's folder where this machine sees it, else one of its own for one run.

    The latter has the same name again where a run begins again on a machine on which its process
    was killed, so that it goes on from the checkpoint there.
    """
    if _sees_study(order):
        yield Path(order["study"])
        return
    name = hashlib.sha256(f"{order['token']} {order['task']['folder']}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"swlora-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} is another user's")
    try:
        if order["adapter_files"]:
            unpack(order["adapter_files"], folder / str(order["adapter"]))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_free(folder: Path) -> None:
    """Wait while the process of a run that was lost is still ending in its folder."""
    until_s = time.monotonic() + STOPS_S
    while True:
        try:
            lock_folder(folder).release()
            return
        except UserError:
            if time.monotonic() > until_s:
                raise
            time.sleep(LOOK_EVERY_S)


def _make_ready(folder: Path, task: Task) -> bool:
    """Make the run's folder ready; say whether the run goes on from a checkpoint."""
    if task.phase == "runs" and has_snapshot(folder / "checkpoint"):
        return True
    shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return False


def _threads(n: int) -> dict[str, str]:
    """Return the variables that say how many threads compute: Ray sets them for its workers."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(n))


def _watch(
    process: "subprocess.Popen[bytes]", folder: Path | None
) -> Generator[Message, None, int]:
    """Wait for a process and return its code; yield the end of its metrics, if in `folder`."""
    told = b""
    try:
        while True:
            try:
                return process.wait(timeout=LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                tail = _tail(folder) if folder else b""
            yield {"kind": "metrics", "tail": tail} if tail != told else {"kind": "alive"}
            told = tail
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=STOPS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tail(folder: Path) -> bytes:
    try:
        return read_tail(folder / METRICS, TAIL_BYTES)
    except UnreadableError:
        return b""


def _packed(folder: Path, study: Path, as_study: Path) -> tuple[dict[str, bytes], list[str]]:
    """Return (files of a run by their names, names of those left out since they are too large).

    Paths in them become those that they have in the study's folder.
    """
    files: dict[str, bytes] = {}
    left_out, left_bytes = [], SENT_BYTES
    here = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    for path in sorted(here, key=lambda p: p.stat().st_size):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in NOT_SENT:
            continue
        if path.stat().st_size > left_bytes:
            left_out.append(name)
            continue
        content = read_tail(path, LOG_BYTES) if name == LOG else path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".yaml", ".txt"):
            content = content.replace(os.fsencode(study), os.fsencode(as_study))
        files[name] = content
        left_bytes -= len(content)
    return files, left_out


def unpack(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files into a folder; RunFailedError for a name that leads out of it."""
    for name, content in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise RunFailedError(f"a machine sent a file named {name!r}, which is no name in a run")
        path = folder / parts
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a run's folder, to be sent to where its adapter is evaluated.

    Raises RunFailedError where they are too large.
    """
    files, left_out = _packed(folder, folder, folder)
    if left_out:
        raise RunFailedError(
            f"{folder / left_out[0]} is too large to be sent ({SENT_BYTES >> 20} MB in all); "
            "use a folder that all machines see"
        )
    return files
