"""The attention function that transformers calls, and what it calls in turn."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swlora.errors import RunFailedError
from swlora.kernels.attention_interface import Scoring, attending, attention_forward

MakeModel = Callable[..., Any]
STATES = [torch.zeros(1, 2, 5, 4)] * 3


class Recorded:
    """An attention that keeps what it was asked for and returns a number of its own."""

    def __init__(self, number: float = 0.0) -> None:
        self.number = number
        self.asked: list[dict[str, Any]] = []

    def __call__(self, query: Tensor, _key: Tensor, _value: Tensor, scoring: Scoring) -> Tensor:
        self.asked.append(vars(scoring))
        return query.transpose(1, 2) + self.number


def attend(**options: Any) -> tuple[Tensor, None]:
    return attention_forward(torch.nn.Identity(), *STATES, None, **options)


def config() -> Any:
    return SimpleNamespace(_attn_implementation="eager")


def test_what_a_block_asks_for_is_handed_on() -> None:
    attention = Recorded()
    with attending(config(), attention, 2, ""):
        assert attend()[1] is None
        attend(scaling=0.7, sliding_window=3, softcap=2.0, position_ids=None)
    assert attention.asked == [
        {"scale": 0.5, "window": None, "softcap": None},
        {"scale": 0.7, "window": 3, "softcap": 2.0},
    ]


@pytest.mark.parametrize(
    ("mask", "dropout"), [(torch.zeros(1, 1, 5, 5), 0.0), (None, 0.1)], ids=["mask", "dropout"]
)
def test_what_no_layout_knows_is_refused(mask: Tensor | None, dropout: float) -> None:
    with (
        pytest.raises(RunFailedError, match="no mask, no attention dropout"),
        attending(config(), Recorded(), 1, ""),
    ):
        attention_forward(torch.nn.Identity(), *STATES, mask, dropout=dropout)


def test_the_innermost_attention_counts() -> None:
    with attending(config(), Recorded(1.0), 1, ""):
        with pytest.raises(ZeroDivisionError), attending(config(), Recorded(2.0), 1, ""):
            assert float(attend()[0].mean()) == 2.0
            raise ZeroDivisionError
        assert float(attend()[0].mean()) == 1.0
    with pytest.raises(LookupError):
        attend()


@pytest.mark.parametrize("n_blocks", [0, 2])
def test_every_block_must_have_followed(n_blocks: int) -> None:
    with (
        pytest.raises(RunFailedError, match=f"^1 of {n_blocks} blocks do as they are told$"),
        attending(config(), Recorded(), n_blocks, "do as they are told"),
    ):
        attend()


def test_the_model_gets_its_own_attention_back(make_model: MakeModel) -> None:
    own = make_model("llama").config
    before = own._attn_implementation
    with attending(own, Recorded(), 0, ""):
        assert own._attn_implementation != before
    assert own._attn_implementation == before
    with pytest.raises(ZeroDivisionError), attending(own, Recorded(), 0, ""):
        raise ZeroDivisionError
    assert own._attn_implementation == before
