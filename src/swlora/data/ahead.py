"""Work on the next item in a thread while the last one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def worked_ahead(
    items: Iterable[Item], work: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item and work(item), in order; the work on the next one has begun then.

    It pays where `work` releases Python's lock. Items are asked for in the caller's thread, two of
    them are held at a time, and what `work` raises is raised where its item is due.
    """
    waiting: tuple[Item, Future[Result]] | None = None
    with ThreadPoolExecutor(1) as beside:
        for item in items:
            begun = item, beside.submit(work, item)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = begun
        if waiting:
            yield waiting[0], waiting[1].result()
