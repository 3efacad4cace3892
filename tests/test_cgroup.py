"""What control groups let this process take, read from trees of both versions."""

import os

import pytest
from tests.support.control_groups import lay_groups

from swlora.cgroup import memory_left_bytes, quota_cores, swap_left_bytes

NO_LIMIT = "9223372036854771712"  # as v1 writes it
V1 = "9:name=systemd:/x\n4:memory:/slurm/job_7\n1:cpu,cpuacct:/slurm/job_7\n0::/\n"


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A function (own, files by their paths in the tree) that lays groups."""
    return lambda own, files: lay_groups(monkeypatch, tmp_path, own, files)


def memory(limit: object, used: int, **stat: int) -> dict[str, str]:
    lines = "\n".join(f"{name} {value}" for name, value in {"anon": 1, **stat}.items())
    return {"memory.max": str(limit), "memory.current": str(used), "memory.stat": lines}


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_without_groups_no_limit_is_known(groups):
    groups("", {})
    assert (memory_left_bytes(), swap_left_bytes(), quota_cores()) == (None, None, None)


def test_files_that_the_system_keeps_are_free_memory(groups):
    groups("0::/\n", memory(1000, 700))
    assert memory_left_bytes() == 300
    groups("0::/\n", memory(1000, 700, inactive_file=300, active_file=100, slab_reclaimable=50))
    assert memory_left_bytes() == 750
    groups("0::/\n", memory(1000, 700, inactive_file=5000))
    assert memory_left_bytes() == 1000
    groups("0::/\n", memory(600, 700))
    assert memory_left_bytes() == 0


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ("0::/job/step/task\n", 40),
        ("0::/job/step\n", 40),
        ("0::/job\n", 100),
        ("0::/other:with a colon\n", 7),
        ("0::/\n", None),
        ("0::/../job\n", None),  # of a container that this process is not in
    ],
)
def test_the_least_that_a_group_or_one_above_it_leaves(own, left, groups):
    groups(
        own,
        below("job", memory(1000, 900))
        | below("job/step", memory(500, 480, active_file=20))
        | below("job/step/task", memory("max", 400))
        | below("other:with a colon", memory(20, 13)),
    )
    assert memory_left_bytes() == left


def test_the_first_version_of_groups(groups):
    job = {
        "memory.limit_in_bytes": "1000",
        "memory.usage_in_bytes": "900",
        "memory.stat": "cache 9\ninactive_file 5\ntotal_inactive_file 200\ntotal_active_file 30",
        "memory.memsw.limit_in_bytes": "1500",
        "memory.memsw.usage_in_bytes": "1100",  # 200 of it in swap
    }
    none = {name: NO_LIMIT for name in job if name.endswith("limit_in_bytes")}
    quota = {"cpu.cfs_quota_us": "350000", "cpu.cfs_period_us": "100000"}
    trees = groups(
        V1,
        below("memory", job | none)
        | below("memory/slurm/job_7", job)
        | below("cpu", quota | {"cpu.cfs_quota_us": "-1"})
        | below("cpu/slurm/job_7", quota),
    )
    assert (memory_left_bytes(), swap_left_bytes(), quota_cores()) == (330, 300, 4)
    (trees / "memory/slurm/job_7/memory.memsw.limit_in_bytes").write_text(NO_LIMIT)
    assert (memory_left_bytes(), swap_left_bytes()) == (330, None)
    # In a container the own group is the root, though it has its name from outside.
    groups(V1.replace("slurm", "docker"), below("memory", job) | below("cpu", quota))
    assert (memory_left_bytes(), swap_left_bytes(), quota_cores()) == (330, 300, 4)


@pytest.mark.parametrize(
    ("limit", "used", "left"), [("0", 0, 0), ("500", 200, 300), ("10", 30, 0), ("max", 30, None)]
)
def test_swap_that_a_group_may_use(limit, used, left, groups):
    groups("0::/pod\n", below("pod", {"memory.swap.max": limit, "memory.swap.current": str(used)}))
    assert swap_left_bytes() == left


@pytest.mark.parametrize(
    ("own", "n"), [("/a/b", 2), ("/a", 4), ("/half", 1), ("/free", None), ("/odd", None)]
)
def test_cpu_time_is_for_so_many_cores(own, n, groups):
    quotas = {"a": "400000 100000", "a/b": "150000 100000", "half": "5000 10000"}
    quotas |= {"free": "max 100000", "odd": "5 0"}
    groups(f"0::{own}\n", {f"{group}/cpu.max": quota for group, quota in quotas.items()})
    assert quota_cores() == n


def test_what_cannot_be_read_is_no_limit(groups):
    trees = groups("0::/a\n", memory("9" * 5000, 1) | {"cpu.max": "many", "a/memory.max": "7"})
    os.mkfifo(trees / "a/memory.current")  # is not waited for
    (trees / "a/cpu.max").mkdir()
    (trees / "memory.swap.max").write_bytes(b"\xff1")
    assert (memory_left_bytes(), swap_left_bytes(), quota_cores()) == (None, None, None)
    groups("no group\n\n::\n", {})
    assert memory_left_bytes() is None
