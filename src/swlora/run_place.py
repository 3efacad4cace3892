"""Where a run may begin: a folder without another run, or a fresh one; what is put right there."""

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.files import is_scratch, make_folder, remove_scratch, restore_folder
from swlora.work_folder import present_status, read_facts

RUN = "run.json"
ADAPTERS, CHECKPOINT = ("adapter", "best"), "checkpoint"  # folders there
CONFIG = "config.yaml"
DEFAULT_PARENT = Path("runs")
RESUMABLE = ("train", "train-eval")
NEEDED = ("status", "command")  # in run.json
STOPPED = "stopped_after_step"  # there, of a training that a callback ended before its last step


def check_free(folder: Path) -> None:
    """Refuse a folder with a run, unless that run came to nothing and left nothing."""
    if not (folder / RUN).exists():
        if (folder / CONFIG).exists():
            raise UserError(f"{folder} holds a {CONFIG} of something else; choose another --output")
        return
    facts = read_facts(folder / RUN, NEEDED)
    names = {path.name for path in folder.iterdir() if not is_scratch(path.name)}
    never_began = facts["status"] == "running" and CONFIG not in names
    if names <= {RUN, CONFIG} and (never_began or facts["status"] in ("failed", "cancelled")):
        return
    has_ended = facts["status"] == "done" and STOPPED not in facts
    can_resume = not has_ended and facts["command"] in RESUMABLE
    raise UserError(
        f"{folder} already holds a run ({present_status(folder / RUN, facts)}); choose another "
        "--output" + (" or continue it with --resume" if can_resume else "")
    )


def tidy(folder: Path, facts: Mapping[str, Any]) -> None:
    """Remove what a kill left half-written, or half-removed after the end of the run.

    Checkpoints of a training that is done stay, for more epochs; those of `full`, which are three
    models each, go.
    """
    checkpoint = folder / CHECKPOINT
    remove_scratch(folder)
    remove_scratch(checkpoint)
    for name in ADAPTERS:
        restore_folder(folder / name)
    method = facts.get("settings", {}).get("adapter.method")
    may_be_extended = facts["command"] in RESUMABLE and (method != "full" or STOPPED in facts)
    if facts["status"] == "done" and not may_be_extended:
        shutil.rmtree(checkpoint, ignore_errors=True)


def default_folder(command: str) -> Path:
    """Return a fresh folder name under runs/ for a command that was given no --output."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = DEFAULT_PARENT / f"{command}-{stamp}"
    suffix = 1
    while folder.exists():
        suffix += 1
        folder = DEFAULT_PARENT / f"{command}-{stamp}-{suffix}"
    return folder


def made_default_folder(command: str) -> Path:
    """Make and return a default folder that no other process has taken."""
    while True:
        folder = default_folder(command)
        with suppress(FileExistsError):
            make_run_folder(folder, exist_ok=False)
            return folder


def make_run_folder(folder: Path, *, exist_ok: bool) -> None:
    """Make a folder for a run; UserError where that cannot be done."""
    try:
        make_folder(folder, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot make {folder}: {error.strerror}; choose another --output"
        ) from error
