"""The beginning and the end of work that several processes do together.

Where one fails, all end with its message, which the first process shows; an error that all of them
meet is shown once.
"""

import _thread
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from swlora.errors import RunFailedError, UserError, brief
from swlora.processes.peers import INTERRUPTED, LOOK_EVERY_S, SILENT_S, Peers
from swlora.processes.world import World, world

MEET_S = 300.0
SAME_ERROR_S = 2.0  # an error of all processes is the first one's, if it meets it within this time
LEAVE_S = 20.0  # how long the others wait for the first process to end
NOTICED_S, ENDED_S = 8.0, 60.0  # how long a failure may go unnoticed, and the ending may take
LAST_WORDS_S = 5.0  # how long may be written down why, before a process is ended that hangs

S = TypeVar("S")
T = TypeVar("T")


class _State:
    """What holds for this process: nothing, while it works alone."""

    peers: Peers | None = None
    n_joined = 0  # pieces of work done together so far, one after another
    is_interruptible = True
    last_words: Callable[[BaseException], None] | None = None
    makes_for_all = False  # within `from_main`: the others wait
    speaks: bool | None = None  # whether it shows the error with which it ends, where that is known


_state = _State()


class StoppedTogether(KeyboardInterrupt):
    """All processes were asked to stop, and do so after the same step."""


@contextmanager
def joined(n_asked: int | None = None) -> Iterator[None]:
    """Work together with the other processes while the body runs; all end it, or none.

    `n_asked` is how many there are to be. Raises UserError where there are not, and what ended
    another process, which it names; a process that does not notice that is ended.
    """
    us = world()
    if n_asked is not None and us.size != n_asked:
        raise UserError(_not_as_asked(n_asked, us.size))
    if not us.is_shared or _state.peers is not None:
        yield
        return
    _state.n_joined += 1
    peers = _state.peers = Peers(us, lambda: _connect(f"swlora/{_state.n_joined}"))
    try:
        peers.meet(MEET_S)
        threading.Thread(target=_end_what_hangs, args=(peers,), daemon=True).start()
        yield
        if not us.is_main:
            peers.await_end_of_main()  # until then it may fail, for all
        peers.leave()
    except BaseException as error:
        ended_by = _ended_by(peers, error)
        if ended_by is error:
            raise
        raise ended_by from error
    finally:
        _state.peers = None


def _not_as_asked(n_asked: int, size: int) -> str:
    return (
        f"--processes {n_asked}, and there {'is 1' if size == 1 else f'are {size}'}: start with "
        f"torchrun --nproc-per-node {n_asked} -m swlora ... (accelerate launch --cpu starts a "
        "single one)"
    )


def _connect(prefix: str) -> Any:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=MEET_S))))
    except (RuntimeError, ValueError) as error:
        raise RunFailedError(f"the processes cannot meet: {brief(error)}") from error
    return PrefixStore(prefix, store)


def _ended_by(peers: Peers, error: BaseException) -> BaseException:
    """Tell the others of an error, or take theirs for it; return what is to be raised here."""
    peers.is_noticed = True
    us, is_interrupted = peers.world, isinstance(error, KeyboardInterrupt)
    _state.speaks = us.is_main  # also where a second interruption ends this function
    is_together = isinstance(error, StoppedTogether)
    if not is_together and (is_interrupted or not us.is_main):
        # A launcher interrupts the others of a process that died.
        peers.look_for_failure(SAME_ERROR_S)
    failure = None if is_together else peers.failure or peers.fail(*_said(us.me, error))
    if not us.is_main:
        has_left = peers.await_leaving(0, LEAVE_S)
        _state.speaks = not has_left and (failure is None or failure.by == us.rank)
    peers.leave()
    if failure is None or failure.by == failure.rank == us.rank:
        return error
    is_own = isinstance(error, Exception) and str(error) != failure.message
    is_stopped = is_interrupted and failure.exit_code == INTERRUPTED
    return error if is_own or is_stopped else failure.error()


def _said(me: str, error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return f"{me}: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"{me} was interrupted", INTERRUPTED
    return f"{me}: {brief(error)}", 1


def _end_what_hangs(peers: Peers) -> None:
    """Interrupt this process where another failed; end it where it does not even notice that."""
    while (failure := peers.failure) is None:
        time.sleep(LOOK_EVERY_S)
        if _state.peers is not peers:
            return
        peers.count_look()
    time.sleep(LOOK_EVERY_S)
    if _state.is_interruptible and not peers.is_noticed:
        _thread.interrupt_main()
    began_s = time.monotonic()
    while time.monotonic() - began_s < (ENDED_S if peers.is_noticed else NOTICED_S):
        time.sleep(LOOK_EVERY_S)
        if _state.peers is not peers:
            return
    if peers.world.is_main or failure.by == peers.world.rank:
        print(f"swlora: {failure.message}", file=sys.stderr, flush=True)
    if tell := _state.last_words:  # in a thread: a disk may hang, too
        telling = threading.Thread(target=tell, args=(failure.error(),), daemon=True)
        telling.start()
        telling.join(LAST_WORDS_S)
    os._exit(failure.exit_code)


@contextmanager
def last_words(tell: Callable[[BaseException], None]) -> Iterator[None]:
    """Have `tell` called where this process hangs in the body, and is ended for another's failure.

    It is called in another thread, with the error that the process would have ended with.
    """
    before, _state.last_words = _state.last_words, tell
    try:
        yield
    finally:
        _state.last_words = before


def ended_well() -> bool:
    """Say whether no common work has ended with an error so far."""
    return _state.speaks is None


def is_speaker() -> bool:
    """Say whether this process shows how the work ended: the first one does, or who misses it.

    What fails before the work is common is shown by one process of every machine.
    """
    if _state.speaks is not None:
        return _state.speaks
    try:
        return world().local_rank == 0
    except UserError:
        return True


@contextmanager
def interruptible(is_so: bool = True) -> Iterator[None]:
    """Let the failure of another process be raised within the body, at any moment, or not."""
    before, _state.is_interruptible = _state.is_interruptible, is_so
    try:
        yield
    finally:
        _state.is_interruptible = before


def check_peers() -> None:
    """Raise the failure of another process, where one is known and the work may be interrupted."""
    if _state.peers is not None and _state.is_interruptible:
        _state.peers.check()


def has_failed() -> bool:
    """Say whether another process is known to have failed."""
    return _state.peers is not None and _state.peers.failure is not None


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Turn a RuntimeError of the body, where processes exchange tensors, into what is behind it."""
    try:
        yield
    except RuntimeError as error:
        peers = _state.peers
        if peers is None:
            raise
        failure = peers.look_for_failure(SILENT_S + 4 * LOOK_EVERY_S)
        raise (
            failure.error() if failure else RunFailedError(f"{what} failed: {brief(error)}")
        ) from error


def from_main(make: Callable[[], T]) -> T:
    """Return what the first process makes, a value of JSON, in all; the others wait for it.

    Within `make` the first process works alone (`team`): what it calls there waits for no other
    one, and sends it nothing. The whole work ends where it raises an error.
    """
    peers = _partners()
    if peers is None:
        return make()
    made: T = peers.from_main(_made_alone(make) if peers.world.is_main else None)
    return made


def _made_alone(make: Callable[[], T]) -> T:
    _state.makes_for_all = True
    try:
        return make()
    finally:
        _state.makes_for_all = False


def _partners() -> Peers | None:
    """Return the processes that messages go to, None where this one works alone."""
    return None if _state.makes_for_all else _state.peers


def team() -> World:
    """Return who does the work at hand: all processes, or this one alone within `from_main`.

    Work is dealt by this; `world` says who is there, by which cores and memory are shared.
    """
    return World() if _state.makes_for_all else world()


def gathered(value: Any) -> list[Any]:
    """Return the value, one of JSON, of every process of the team, by rank."""
    return [value] if (peers := _partners()) is None else peers.gathered(value)


def dealt(items: Sequence[S], make: Callable[[S], T]) -> list[T]:
    """Return what `make` makes of every item, values of JSON, in their order; in all processes.

    Each process makes every so many-th of them.
    """
    us = team()
    shares = gathered([make(item) for item in items[us.rank :: us.size]])
    return [shares[i % us.size][i // us.size] for i in range(len(items))]


def wait() -> None:
    """Wait until all processes are here."""
    gathered(None)


def check_alike(what: str, values: Mapping[str, Any]) -> None:
    """Raise UserError where another process has other values than the first, and name it."""
    found = gathered([platform.node(), dict(values)])
    _, first = found[0]
    for rank, (host, theirs) in enumerate(found):
        names = [n for n in (first | theirs) if first.get(n) != theirs.get(n)]
        if names:
            name = names[0]
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"rank {rank} on {host} has other {what} than rank 0: {name} is "
                f"{theirs.get(name)!r} there and {first.get(name)!r} here{more}; all processes "
                "need the same"
            )
