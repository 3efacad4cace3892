"""The process of one run: its command line, its cache and its log."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from swlora.caches import ENGLISH, PREFIX
from swlora.paths import cache_dir
from swlora.study.plan import Task

LOG = "log.txt"

Command = Callable[[Task, Path, Path, bool], list[str]]


def child_command(task: Task, study: Path, config: Path, resume: bool) -> list[str]:
    """Return the command line of a run's process."""
    output = ["--output", str(study / task.folder)]
    swlora = [sys.executable, "-m", "swlora"]
    if resume:
        return [*swlora, "train-eval", "--resume", *output]
    given = ["--config", str(config), *output]
    if task.phase == "runs":
        return [*swlora, "train-eval", *given]
    if task.phase == "beam":
        return [*swlora, "eval", "--adapter", str(study / str(task.adapter)), *given]
    work = "layers" if task.phase == "identify" else "train"
    return [sys.executable, "-m", "swlora.study.work", work, *given]


def start_process(
    command: list[str],
    folder: Path,
    environment: Mapping[str, str],
    working_folder: Path | None = None,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a run's process, which writes what it says into the log of its folder.

    `descriptors` are those of open files that it is handed, such as a lock's.
    """
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            cwd=working_folder,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C reaches the study alone, which then stops the run
        )


def fill_cache(cache: Path) -> None:
    """Make a cache folder with everything of the user's but prefixes, as links."""
    shared = cache_dir().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # of one that may only be read
        (shared / ENGLISH).mkdir(parents=True, exist_ok=True)  # measured by one run, for all
    for entry in sorted(shared.iterdir()) if shared.is_dir() else []:
        link = cache / entry.name
        if entry.name != PREFIX and not entry.name.startswith(".") and not link.exists():
            link.symlink_to(entry)
