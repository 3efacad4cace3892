"""The cores that this process has: those that it may run on, and how many it can keep busy."""

import os

from swlora.cgroup import quota_cores


def allowed_cores() -> set[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def n_usable_cores() -> int:
    """Return how many cores this process can keep busy.

    They are fewer than it may run on where its container has CPU time for fewer (`docker run
    --cpus 4`).
    """
    n_allowed, quota = len(allowed_cores()), quota_cores()
    return n_allowed if quota is None else min(n_allowed, quota)
