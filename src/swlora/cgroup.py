"""What Linux lets the control groups of this process take: memory, swap, CPU time.

Containers, Slurm, systemd and Kubernetes limit a process by its group or by one above it, and the
numbers of the machine say nothing of that. All limits are in one tree of groups (v2), or those of
each resource in a tree of their own (v1). A container may see its own group alone, at the root of
the tree. What cannot be read is no limit that is known; /proc/self/cgroup names the groups.

Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from swlora.bounded_read import read_bounded

TREES = Path("/sys/fs/cgroup")  # that of v2, or a folder for each resource of v1
OWN_GROUPS = Path("/proc/self/cgroup")
_MAX_BYTES = 64 << 10  # of a file: memory.stat has about 2,000
_NO_LIMIT = 1 << 60  # bytes; v1 writes a number above it where there is none


@dataclass(frozen=True)
class _MemoryFiles:
    limit: str
    used: str
    reclaimable: tuple[str, ...]  # in memory.stat, with the groups below


_V2 = _MemoryFiles(
    limit="memory.max",
    used="memory.current",
    reclaimable=("inactive_file", "active_file", "slab_reclaimable"),
)
_V1 = _MemoryFiles(
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    reclaimable=("total_inactive_file", "total_active_file"),
)


def memory_left_bytes() -> int | None:
    """Return what the groups leave this process of memory; None where no limit is known.

    Pages of files that the kernel keeps count as free, as they do in what a machine has available:
    it takes them back before it ends a program.
    """
    left = [_memory_left(folder, _V2) for folder in _folders()]
    return _least(left + [_memory_left(folder, _V1) for folder in _folders("memory")])


def swap_left_bytes() -> int | None:
    """Return what the groups leave this process of swap; None where no limit is known."""
    left = [
        _left(_number(folder / "memory.swap.max"), _number(folder / "memory.swap.current"))
        for folder in _folders()
    ]
    return _least(left + [_v1_swap_left(folder) for folder in _folders("memory")])


def quota_cores() -> int | None:
    """Return how many cores' CPU time the groups give this process, rounded up; None: any number.

    Threads beyond that are stopped for the rest of each period.
    """
    quotas = [_cores(_text(folder / "cpu.max")) for folder in _folders()]
    for folder in _folders("cpu"):
        period = _text(folder / "cpu.cfs_period_us")
        quotas.append(_cores(f"{_text(folder / 'cpu.cfs_quota_us')} {period}"))
    return _least(quotas)


def _folders(resource: str = "") -> Iterator[Path]:
    """Yield the folders of this process's group and of those above it: v2's, or a resource's of v1.

    Those that a container does not see are not there.
    """
    path = PurePosixPath(_own_path(resource).lstrip("/"))
    if ".." in path.parts:  # outside of what the container sees
        path = PurePosixPath()
    for group in (path, *path.parents):
        yield TREES / resource / group


def _own_path(resource: str) -> str:
    """Return the group of this process in a tree, such as "/user.slice"; "" where none is named."""
    for line in _text(OWN_GROUPS).splitlines():
        _, _, tree = line.partition(":")
        resources, _, path = tree.partition(":")
        if resource in resources.split(","):
            return path
    return ""


def _memory_left(folder: Path, files: _MemoryFiles) -> int | None:
    limit = _number(folder / files.limit)
    left = _left(limit, _number(folder / files.used))
    if limit is None or left is None:
        return None
    return min(limit, left + _reclaimable(folder / "memory.stat", files.reclaimable))


def _reclaimable(stat: Path, names: tuple[str, ...]) -> int:
    lines = [line.split() for line in _text(stat).splitlines()]
    found = {line[0]: line[1] for line in lines if len(line) == 2}
    return sum(int(found[name]) for name in names if found.get(name, "").isdecimal())


def _v1_swap_left(folder: Path) -> int | None:
    """Return what is left of v1's limit on memory and swap together beside that of memory."""
    both, memory = (
        _left(
            _number(folder / f"{kind}.limit_in_bytes"), _number(folder / f"{kind}.usage_in_bytes")
        )
        for kind in ("memory.memsw", "memory")
    )
    return _left(both, memory)


def _cores(quota_and_period: str) -> int | None:
    """Return the cores of a limit such as "150000 100000", in µs; None for "max 100000" and -1."""
    try:
        quota, period = map(int, quota_and_period.split())
    except ValueError:
        return None
    return -(-quota // period) if quota > 0 and period > 0 else None


def _left(limit: int | None, used: int | None) -> int | None:
    return None if limit is None or used is None else limit - used


def _least(values: list[int | None]) -> int | None:
    return min((max(0, value) for value in values if value is not None), default=None)


def _number(path: Path) -> int | None:
    try:
        number = int(_text(path))
    except ValueError:  # "max", or no such file
        return None
    return number if number < _NO_LIMIT else None


def _text(path: Path) -> str:
    """Return what is in a file; "" where it cannot be read."""
    try:
        return read_bounded(path, _MAX_BYTES)[0].decode("ascii")
    except (OSError, ValueError):
        return ""
