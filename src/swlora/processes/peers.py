"""Short messages between the processes of one piece of work, and who of them is gone.

Messages are JSON in the key-value store that the launcher keeps. Waiting for one is polling, so
that it ends at once where another process failed:
- one that fails by itself says why in the store; the first to say so is the one that is believed;
- one that was killed says nothing. The first process misses it: on its own machine by its process
  number, elsewhere by its heartbeat in the store. The others miss the first one in the same ways.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from swlora.errors import RunFailedError, UserError
from swlora.processes.world import World

LOOK_EVERY_S = 0.5
BEAT_EVERY_S = 2.0
SILENT_S = 16.0  # so long without a heartbeat, and a process counts as gone
POLL_S = (0.002, 0.1)  # between two looks for a message: at first, and at most
LEAVE_S = 5.0  # how long the first process waits for the others to leave
PART_CHARACTERS = 1 << 22  # the launcher's store takes 8 MiB at once, and hangs up on more
INTERRUPTED = 130  # the exit code of who was asked to stop
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of this machine since it was started


@dataclass(frozen=True)
class Failure:
    """Why the common work cannot go on: `rank` failed with an exit code, `by` noticed."""

    rank: int
    by: int
    message: str
    exit_code: int = 1

    def error(self) -> BaseException:
        """Return it as the exception that ends every process."""
        if self.exit_code == INTERRUPTED:
            return KeyboardInterrupt(self.message)
        return (UserError if self.exit_code == UserError.exit_code else RunFailedError)(
            self.message
        )


@dataclass(frozen=True)
class _Place:
    """Where a process is: `space` is the same for those that see each other's numbers."""

    host: str
    space: str
    number: int

    @classmethod
    def own(cls) -> "_Place":
        space = platform.node()  # which other machines may have, too
        with suppress(OSError):
            space += f" {BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        return cls(platform.node(), space, os.getpid())

    def process(self) -> psutil.Process | None:
        """Return the process of this machine at that place; None where there is none any more."""
        try:
            return psutil.Process(self.number)
        except psutil.NoSuchProcess:
            return None


def _has_ended(process: psutil.Process | None) -> bool:
    """Say whether a process has ended, whether or not it was waited for."""
    try:
        return process is None or not (
            process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return True


def _has_launcher_store() -> bool:
    """Say whether the launcher keeps the store, and not the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class Peers:
    """The processes of one piece of work as this one sees them.

    `connect` makes a new connection to the store: one for messages, one for the watching thread.
    """

    def __init__(self, world: World, connect: Callable[[], Any]) -> None:
        self.world = world
        self.failure: Failure | None = None
        self.is_noticed = False  # by the work of this process, which ends
        self._store, self._watched = connect(), connect()
        self._n_messages = 0
        self._places: dict[int, _Place] = {}
        self._near: dict[int, psutil.Process | None] = {}  # those of this machine
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._n_unanswered = 0  # looks since the store answered the watching thread
        self._is_store_lost = False
        self._store.set(f"place/{world.rank}", json.dumps(asdict(_Place.own())))

    def meet(self, within_s: float) -> None:
        """Wait until all processes are there, and watch them from then on; RunFailedError."""
        store, size = self._store, self.world.size
        store.add("n_come", 1)
        until_s = time.monotonic() + within_s
        while (n_come := store.add("n_come", 0)) < size:
            if time.monotonic() > until_s:
                raise RunFailedError(
                    f"only {n_come} of {size} processes came within {within_s:.0f} s; were all "
                    "machines started, with the same address of the first one?"
                )
            time.sleep(POLL_S[1])
        watched = range(1, size) if self.world.is_main else [0]
        own_space = _Place.own().space
        for rank in watched:
            place = self._places[rank] = _Place(**json.loads(store.get(f"place/{rank}")))
            if place.space == own_space:
                self._near[rank] = place.process()
        threading.Thread(target=self._watch, daemon=True, name="watch the processes").start()

    def from_main(self, value: Any = None) -> Any:
        """Return what the first process gives, in all of them."""
        key = self._next_key()
        with self._reaching():
            if self.world.is_main:
                self._write(key, value)
            return self._read_message(key)

    def gathered(self, value: Any) -> list[Any]:
        """Return what every process gives, by rank, in all of them."""
        key, values = self._next_key(), None
        with self._reaching():
            self._write(f"{key}/{self.world.rank}", value)
            if self.world.is_main:  # it reads for all, who would read as often as they are many
                values = [self._read_message(f"{key}/{rank}") for rank in range(self.world.size)]
        return self.from_main(values)  # type: ignore[no-any-return]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn the error of a store that is gone into the failure of who kept it."""
        try:
            yield
        except RuntimeError:
            self._lost_store()
            self.check()

    def _next_key(self) -> str:
        self._n_messages += 1
        return f"message/{self._n_messages}"

    def _write(self, key: str, value: Any) -> None:
        text = json.dumps(value)  # ASCII
        starts = range(0, len(text), PART_CHARACTERS)
        for number, start in enumerate(starts):
            self._store.set(f"{key}/part/{number}", text[start : start + PART_CHARACTERS])
        self._store.set(key, str(len(starts)))

    def _read_message(self, key: str) -> Any:
        n_parts = int(self._read(key))
        parts = [self._store.get(f"{key}/part/{number}") for number in range(n_parts)]
        return json.loads(b"".join(parts))

    def _read(self, key: str) -> bytes:
        """Wait for a message and return it; raises the failure of another process."""
        wait_s = POLL_S[0]
        while not self._store.check([key]):
            self.check()
            time.sleep(wait_s)
            wait_s = min(POLL_S[1], 1.5 * wait_s)
        found: bytes = self._store.get(key)
        return found

    def await_end_of_main(self) -> None:
        """Wait until the first process has left; raises the failure of another process."""
        with self._reaching():
            self._read("left/0")

    def check(self) -> None:
        """Raise the failure of another process, where one is known."""
        if self.failure is not None:
            self.is_noticed = True
            raise self.failure.error()

    def look_for_failure(self, within_s: float) -> Failure | None:
        """Return why another process failed, waiting for it to be known."""
        until_s = time.monotonic() + within_s
        while self.failure is None and time.monotonic() < until_s:
            self._look()
            time.sleep(POLL_S[1])
        return self.failure

    def fail(self, message: str, exit_code: int = 1, rank: int | None = None) -> Failure:
        """Tell all processes of a failure, this one's where no rank is given; return the first."""
        me = self.world.rank
        failure = Failure(me if rank is None else rank, me, message, exit_code)
        try:
            said = self._watched.compare_set("failure", "", json.dumps(asdict(failure)))
            failure = Failure(**json.loads(said))
        except RuntimeError:  # the store is gone: nobody can be told
            pass
        self.failure = failure
        return failure

    def leave(self) -> None:
        """Say that this process ends, and is not to be missed.

        Where the first process keeps the store, it stays until the others have left.
        """
        self._ended.set()
        if self._is_store_lost:
            return
        with suppress(RuntimeError):  # the store is gone: nobody misses it
            self._store.set(f"left/{self.world.rank}", "1")
            if self.world.is_main and not _has_launcher_store():
                until_s = time.monotonic() + LEAVE_S
                for rank in range(1, self.world.size):
                    self.await_leaving(rank, until_s - time.monotonic())

    def await_leaving(self, rank: int, within_s: float) -> bool:
        """Wait until another process has left, or is gone; say whether it has within that time."""
        until_s = time.monotonic() + within_s
        with suppress(RuntimeError):  # the store is gone
            while time.monotonic() < until_s and not self._is_store_lost:
                if self._store.check([f"left/{rank}"]):
                    return True
                if (failure := self.failure) and failure.rank == rank != failure.by:
                    return False
                time.sleep(POLL_S[1])
        return False

    def _watch(self) -> None:
        n_looks = 0
        every = round(BEAT_EVERY_S / LOOK_EVERY_S)
        while not self._ended.wait(LOOK_EVERY_S):
            if n_looks % every == 0:
                self._beat(n_looks)
            n_looks += 1
            if self.failure is None:
                self._look()
            self._n_unanswered = 0

    def count_look(self) -> None:
        """Count a look of another thread: the watching one waits for ever where a machine is off.

        They are counted, and not the time, in which this process may have been stopped itself.
        """
        self._n_unanswered += 1
        if self._n_unanswered > SILENT_S / LOOK_EVERY_S:
            self._lost_store()

    def _beat(self, number: int) -> None:
        try:
            self._watched.set(f"beat/{self.world.rank}", str(number))
        except RuntimeError:
            self._lost_store()

    def _look(self) -> None:
        """Look whether another process said that it failed, or is missed."""
        with self._looking:
            if self.failure is not None or self._ended.is_set():
                return
            try:
                if self._watched.check(["failure"]):
                    self.failure = Failure(**json.loads(self._watched.get("failure")))
                    return
                gone = next((rank for rank in self._places if self._is_gone(rank)), None)
            except RuntimeError:
                self._lost_store()
                return
        if gone is not None:
            self.fail(self._gone(gone), rank=gone)

    def _gone(self, rank: int) -> str:
        place = self._places[rank]
        return (
            f"rank {rank} on {place.host} (process {place.number}) is gone: it was killed, or its "
            "machine is out of reach; a training goes on from its last checkpoint: --resume"
        )

    def _is_gone(self, rank: int) -> bool:
        store, key = self._watched, f"beat/{rank}"
        if rank in self._near:
            is_silent = _has_ended(self._near[rank])
        else:
            now_s, beat = time.monotonic(), store.get(key) if store.check([key]) else b""
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = beat, now_s
            is_silent = now_s - self._beats[rank][1] > SILENT_S
        if not is_silent or store.check(["failure"]):  # it may have said why
            return False
        return not store.check([f"left/{rank}"])

    def _lost_store(self) -> None:
        message = "the launcher is out of reach; a training goes on from its checkpoint: --resume"
        if not _has_launcher_store() and 0 in self._places:
            message = self._gone(0)
        self._is_store_lost = True
        self.failure = self.failure or Failure(0, self.world.rank, message)
