"""Who this process is among those that run the same command."""

import os
import platform
from dataclasses import dataclass

from swlora.errors import UserError


@dataclass(frozen=True)
class World:
    """All processes of one piece of work: `size` of them, `local_size` of those on this machine.

    `rank` numbers them from 0, `local_rank` those of this machine, `machine` the machines.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that reads what others wrote, writes and prints."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Whether there are other processes."""
        return self.size > 1

    @property
    def me(self) -> str:
        """This process for people."""
        return f"rank {self.rank} on {platform.node()}"


def world() -> World:
    """Return what the launcher's environment says; one process where there was none.

    Raises UserError for variables that cannot be.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return World()
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", 1)
    if not (0 <= rank < size and 0 <= local_rank < max(local_size, rank + 1)):
        raise UserError(
            f"the environment says RANK {rank} of WORLD_SIZE {size} and LOCAL_RANK {local_rank} of "
            f"LOCAL_WORLD_SIZE {local_size}, which cannot be; start with torchrun"
        )
    local_size = max(1, local_size)
    return World(rank, size, local_rank, local_size, _number("GROUP_RANK", rank // local_size))


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment says {name}={text!r}, which is no number") from None
