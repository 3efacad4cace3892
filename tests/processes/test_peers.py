"""Messages between processes, and who of them is missed; threads stand for the processes."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore

from swlora.errors import RunFailedError, UserError
from swlora.processes import peers as peers_module
from swlora.processes.peers import INTERRUPTED, Peers, _Place
from swlora.processes.world import World

Meet = Callable[..., list[Peers]]


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meet]:
    """A function (n, places=None) -> n processes that know one another; all leave in the end."""
    monkeypatch.setattr(peers_module, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(peers_module, "BEAT_EVERY_S", 0.04)
    monkeypatch.setattr(peers_module, "SILENT_S", 0.4)
    made: list[Peers] = []

    def met(n: int, places: dict[int, _Place] | None = None) -> list[Peers]:
        store = HashStore()
        made.extend(Peers(World(rank, n), lambda: store) for rank in range(n))
        for rank, place in (places or {}).items():
            store.set(f"place/{rank}", json.dumps(asdict(place)))
        together(made, lambda peers: peers.meet(5.0))
        return made

    yield met
    for peers in reversed(made):  # the first one waits for the others
        peers.leave()


def together(all_peers: list[Peers], work: Callable[[Peers], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(all_peers)) as pool:
        return list(pool.map(work, all_peers))


def test_messages_reach_all_in_order(meet):
    peers = meet(3)
    values = [{"a": [1, None, 0.1]}, "two"]
    for value in values:
        assert (
            together(peers, lambda p, v=value: p.from_main(v if p.world.is_main else "no"))
            == [value] * 3
        )
    assert together(peers, lambda p: p.gathered(p.world.rank * 1.5)) == [[0.0, 1.5, 3.0]] * 3


def test_messages_larger_than_the_store_takes_travel_in_parts(meet, monkeypatch):
    monkeypatch.setattr(peers_module, "PART_CHARACTERS", 7)
    peers, texts = meet(2), ["ä" * 30, "", "a text"]
    assert together(peers, lambda p: p.gathered(texts[p.world.rank :])) == [[texts, texts[1:]]] * 2
    assert together(peers, lambda p: p.from_main(texts)) == [texts] * 2


def test_who_fails_is_believed_first_and_ends_a_wait(meet):
    first, second, third = meet(3)
    waiting = threading.Thread(target=lambda: time.sleep(0.1) or second.fail("no rows", 2))
    waiting.start()
    with pytest.raises(UserError, match="no rows"):
        first.gathered(None)
    waiting.join()
    assert third.fail("something else").message == "no rows"
    with pytest.raises(UserError, match="no rows"):
        third.check()


def test_an_interruption_of_one_interrupts_all(meet):
    first, second = meet(2)
    second.fail("interrupted", INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        first.gathered(0)


def test_a_dead_process_of_the_same_machine_is_missed_at_once(meet):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    place = replace(_Place.own(), number=dead.pid, host="here")
    dead.wait()
    first, _ = meet(2, {1: place})
    failure = first.look_for_failure(within_s=5.0)
    assert failure is not None
    assert f"rank 1 on here (process {dead.pid}) is gone" in failure.message


def test_a_silent_process_of_another_machine_is_missed(meet):
    first, second, third = meet(3, {2: replace(_Place.own(), space="another", host="there")})
    assert first.look_for_failure(within_s=1.0) is None
    third._ended.set()  # no heartbeat any more
    with pytest.raises(RunFailedError, match=r"rank 2 on there .* is gone"):
        second.gathered(None)


def test_one_that_never_gave_a_sign_of_life_is_missed_too(meet, monkeypatch):
    beat = Peers._beat
    monkeypatch.setattr(Peers, "_beat", lambda self, n: self.world.rank == 1 or beat(self, n))
    first, _ = meet(2, {1: replace(_Place.own(), space="another", host="there")})
    failure = first.look_for_failure(within_s=2.0)
    assert failure is not None
    assert "rank 1 on there" in failure.message


def test_a_clock_that_is_set_is_no_death(meet, monkeypatch):
    """The system counts when a process began from the clock's time now."""
    own = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    place = replace(_Place.own(), number=own.pid)
    first, _ = meet(2, {1: place})
    began_s = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: began_s(process) + 3600)
    try:
        assert first.look_for_failure(within_s=0.5) is None
    finally:
        own.communicate(b"\n")
    failure = first.look_for_failure(within_s=5.0)
    assert failure is not None and "is gone" in failure.message


def test_machines_of_one_name_are_several(tmp_path, monkeypatch):
    if not peers_module.BOOT_ID.exists():
        pytest.skip("this system does not number its starts")
    here = _Place.own()
    assert here == _Place.own()
    other = tmp_path / "boot_id"
    other.write_text("another\n")
    monkeypatch.setattr(peers_module, "BOOT_ID", other)
    assert _Place.own().host == here.host
    assert _Place.own().space != here.space


def test_a_store_that_does_not_answer_is_gone(meet, monkeypatch):
    first, second = meet(2)
    asleep = threading.Event()
    monkeypatch.setattr(Peers, "_beat", lambda _self, _number: asleep.wait(20))
    try:
        time.sleep(0.2)  # until both wait
        n_looks = 0
        while second.failure is None and n_looks < 100:
            n_looks += 1
            second.count_look()
        assert n_looks == 21  # SILENT_S of the fixture in looks, and one
        assert "is gone" in second.failure.message  # the first one keeps the store
        second.leave()  # without a word to the store
        assert not second._store.check(["left/1"])
        assert first.failure is None
    finally:
        asleep.set()


def test_who_leaves_is_not_missed(meet):
    first, second = meet(2, {1: replace(_Place.own(), space="another")})
    second.leave()
    assert first.look_for_failure(within_s=1.0) is None
    assert first.await_leaving(1, 1.0)


def test_too_few_processes_are_an_error():
    lonely = Peers(World(0, 3), HashStore)
    lonely._store = lonely._watched = HashStore()
    with pytest.raises(RunFailedError, match="only 1 of 3 processes came within 0 s"):
        lonely.meet(0.05)
