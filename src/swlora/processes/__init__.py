"""Several processes that do one piece of work together, as torchrun and accelerate start them.

    world.py     who this process is, from the environment that they set
    peers.py     short messages between the processes, and who of them is gone
    joining.py   the beginning and the end of the common work
    tensors.py   sums and copies of tensors over all processes; it imports torch

With a single process all of it does nothing and costs nothing.
"""

from swlora.processes.joining import (
    StoppedTogether,
    check_alike,
    check_peers,
    dealt,
    from_main,
    gathered,
    has_failed,
    interruptible,
    is_speaker,
    joined,
    last_words,
    team,
    wait,
)
from swlora.processes.world import World, world

__all__ = [
    "StoppedTogether",
    "World",
    "check_alike",
    "check_peers",
    "dealt",
    "from_main",
    "gathered",
    "has_failed",
    "interruptible",
    "is_speaker",
    "joined",
    "last_words",
    "team",
    "wait",
    "world",
]
