"""`swlora cache`: what lies in the cache folder, and its removal."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import typer

from swlora import caches
from swlora.caches import Entry
from swlora.cli.disk import ago
from swlora.cli.show import show_table
from swlora.disk_space import size
from swlora.errors import UserError
from swlora.paths import cache_dir
from swlora.plural import counted


def list_and_clear(clear: str | None, older_than: str | None, *, yes: bool) -> dict[str, Any]:
    """Print what is in the cache folder, remove what `clear` names, return both.

    clear: kinds of entries, None to list only; older_than: an age such as 7d; yes: do not ask.
    """
    if yes and clear is None:
        raise UserError("--yes goes with --clear")
    kinds = caches.KINDS if clear is None else caches.parse_kinds(clear)
    unused_s = 0.0 if older_than is None else caches.parse_age(older_than)
    chosen = caches.select(caches.entries(), kinds, unused_s)
    _show(chosen)
    cleared = _clear(chosen, yes) if clear is not None else []
    return {
        "folder": str(cache_dir()),
        "entries": [_plain(entry) for entry in chosen],
        "cleared": [str(entry.path) for entry in cleared],
        "freed_bytes": sum(entry.n_bytes for entry in cleared),
    }


def _clear(chosen: Sequence[Entry], yes: bool) -> list[Entry]:
    """Remove entries, after a question where nobody said yes; return those that are gone."""
    free = [entry for entry in chosen if not entry.in_use]
    if not free:
        print("nothing to clear" + (": all of it is in use" if chosen else ""))
        return []
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nobody can be asked here; --yes clears without a question")
        if not typer.confirm(f"remove {_count(free)}, {size(_total(free))}?", err=True):
            print("nothing was removed")
            return []
    cleared = caches.clear(free)
    print(f"removed {_count(cleared)}, {size(_total(cleared))}")
    if len(cleared) < len(chosen):
        print(f"{len(chosen) - len(cleared)} in use stayed")
    return cleared


def _show(found: Sequence[Entry]) -> None:
    print(f"{cache_dir()}: {_count(found)}, {size(_total(found))}")
    now_s = time.time()
    rows = [
        (e.kind, size(e.n_bytes), ago(now_s - e.made_at), _used(e, now_s), e.owner) for e in found
    ]
    if rows:
        show_table([("kind", "size", "made", "last use", "for"), *rows])


def _used(entry: Entry, now_s: float) -> str:
    return "in use" if entry.in_use else ago(now_s - entry.used_at)


def _count(found: Sequence[Entry]) -> str:
    return counted(len(found), "entry", "entries")


def _total(found: Iterable[Entry]) -> int:
    return sum(entry.n_bytes for entry in found)


def _plain(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "path": str(entry.path)}
