"""What the event loop and the model's thread say to each other."""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from swlora.decoding.batch import DecodeRequest, Event
from swlora.models.anatomy import WeightAddress

EndReason = Literal["stop", "length", "deadline", "shutdown", "cancelled", "refused", "failed"]


@dataclass(frozen=True)
class Variant:
    """The model under the named adapter (None: the base model), with some weights at zero."""

    adapter: str | None = None
    zeroed: frozenset[WeightAddress] = frozenset()


@dataclass(frozen=True)
class Limits:
    """How much is taken on; `cache_tokens` bounds slots times the longest text in them."""

    max_slots: int
    queue: int
    deadline_s: float
    cache_tokens: int


@dataclass(frozen=True)
class Ended:
    """How a text ended; `message` says more where it was refused or failed."""

    reason: EndReason
    message: str = ""


@dataclass(eq=False)
class Ticket:
    """One text that is asked for.

    `deliver` gets every event and then one Ended, on the model's thread; it must not block.
    """

    request: DecodeRequest
    variant: Variant
    deliver: Callable[[Event | Ended], None]
    due_s: float = math.inf
    submitted_s: float = 0.0
    cancelled: bool = False

    @property
    def n_tokens(self) -> int:
        """The tokens that the text may grow to."""
        return len(self.request.prompt) + self.request.max_new_tokens


class Decoder(Protocol):
    """Texts of one variant that are continued together."""

    def admit(self, requests: Sequence[DecodeRequest]) -> None:
        """Take new texts."""

    def step(self) -> list[Event]:
        """Add a token to every text."""

    def drop(self, request_id: int) -> None:
        """Forget a text."""


class Host(Protocol):
    """The model and its variants; used by the scheduler's thread alone."""

    def load(self, variant: Variant, keep: Collection[Variant]) -> None:
        """Make the variant ready, those in `keep` staying so; UserError where it cannot be had."""

    def switched(self, variant: Variant) -> AbstractContextManager[None]:
        """Put the model into the variant's state while the body runs."""

    def decoder(self, variant: Variant) -> Decoder:
        """Return an empty decoder for the variant, in whose state the model is."""

    def forget(self, variant: Variant) -> None:
        """Never return the variant's decoder again: it failed, or holds texts that nobody wants."""

    def recover(self, keep: Collection[Variant]) -> bool:
        """Let go of all but `keep` after a failure; say whether the base model is what it was.

        The model is in no variant's state.
        """

    def rebuild(self) -> bool:
        """Put the base model together anew, without any adapter; say whether it is what it was."""


class QueueFullError(Exception):
    """Too much waits already; ask again after `retry_after_s`."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class ShuttingDownError(Exception):
    """Nothing new is taken on."""


class ModelFailedError(Exception):
    """The model failed and does not answer as it did; nothing is taken on until it does."""
