"""Who a process is, what it may take of its machine, and what is wrong with a world."""

import os
from typing import Any

import pytest
import torch

from swlora import memory, threads
from swlora.errors import UserError
from swlora.processes import (
    check_alike,
    dealt,
    from_main,
    gathered,
    joining,
    team,
    tensors,
    wait,
)
from swlora.processes.world import World, world

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def launch(monkeypatch: pytest.MonkeyPatch, *values: int) -> None:
    for name, value in zip(VARIABLES, values, strict=False):
        monkeypatch.setenv(name, str(value))


def test_without_a_launcher_there_is_one_process(monkeypatch):
    assert world() == World(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")  # other programs set it, too
    assert world() == World()
    assert world().is_main and not world().is_shared


def test_who_torchrun_says_a_process_is(monkeypatch):
    launch(monkeypatch, 5, 8, 1, 4, 1)
    assert world() == World(5, 8, 1, 4, 1)
    monkeypatch.delenv("GROUP_RANK")  # other launchers do not say it
    assert world().machine == 1
    assert world().is_shared and not world().is_main


@pytest.mark.parametrize(("values", "words"), [((2, 2), "RANK 2"), ((-1, 2), "RANK -1")])
def test_an_environment_that_cannot_be(values, words, monkeypatch):
    launch(monkeypatch, *values)
    with pytest.raises(UserError, match=f"{words} of WORLD_SIZE 2 .* start with torchrun"):
        world()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UserError, match="RANK='one', which is no number"):
        world()


@pytest.mark.parametrize(
    ("n_here", "asked", "n"), [(2, "1", 4), (2, None, 4), (3, None, 2), (2, "3", 5), (1, "1", 5)]
)
def test_the_processes_of_a_machine_share_its_cores(n_here, asked, n, monkeypatch):
    """Eight cores; 5 threads are what was set before."""
    launch(monkeypatch, 0, n_here, 0, n_here)
    monkeypatch.setattr(threads, "n_usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        threads.share_cores()
        assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)


def test_the_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 8_000)
    monkeypatch.setattr(memory, "_asked_bytes", None)
    monkeypatch.setattr(memory, "_free_bytes", None)
    launch(monkeypatch, 1, 4, 1, 4)
    assert memory.steps_limit_bytes(share=0.5) == 1_000
    assert memory.copies_limit_bytes() == 1_500


def test_a_process_without_a_gpu_of_its_own_is_named(monkeypatch):
    monkeypatch.setattr(tensors, "gathered", lambda _own: [[0, 1], [1, 1]])
    with pytest.raises(UserError, match=r"rank 1 has no GPU of its own: its machine has 1 GPU,"):
        tensors._check_gpus(0)
    monkeypatch.setattr(tensors, "gathered", lambda _own: [[0, 2], [1, 2]])
    tensors._check_gpus(0)


def test_several_processes_need_a_cpu_or_cuda(monkeypatch):
    launch(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="work on CPUs and on CUDA, not on mps"):
        tensors.start_group("mps")


class NobodyAnswers:
    """The messages of the first of two processes, whose partner waits for what it makes."""

    world = World(0, 2)

    def from_main(self, value: Any) -> Any:
        return value

    def gathered(self, _value: Any) -> Any:
        raise AssertionError("the other process is not there")


def test_what_makes_a_value_for_all_works_alone(monkeypatch):
    launch(monkeypatch, 0, 2)
    monkeypatch.setattr(joining._state, "peers", NobodyAnswers())

    def make() -> list[Any]:
        wait()
        check_alike("settings", {"a": 1})
        values = [torch.ones(2)]
        tensors.summed(values)
        copied = tensors.tensors_from_main({"a": values[0]}, torch.device("cpu"))["a"]
        assert team() == World() and world() == World(0, 2)  # who shares cores and memory
        return [dealt([1, 2, 3], lambda n: n * n), from_main(lambda: 4), copied.tolist()]

    assert from_main(make) == [[1, 4, 9], 4, [1.0, 1.0]]
    assert team() == World(0, 2)
    with pytest.raises(AssertionError, match="not there"):
        gathered(1)
    with pytest.raises(UserError):
        from_main(_fails)
    assert team() == World(0, 2)


def _fails() -> None:
    raise UserError("no rows")


def test_alone_everything_is_alike_and_nothing_is_started():
    check_alike("settings", {"a": 1})
    tensors.start_group("cuda")
    values = [torch.ones(2)]
    tensors.summed(values)
    assert values[0].tolist() == [1.0, 1.0]
    assert "MASTER_ADDR" not in os.environ
