"""Rates of streams by hand: the wait for a first token is no part of them."""

import pytest
from benchmarks.serve_llama_cpp import rates

STREAMS = [
    {"tokens": 11, "first_token_s": 1.0, "last_token_s": 3.0},
    {"tokens": 21, "first_token_s": 2.0, "last_token_s": 5.0},
]


def test_streams_one_after_another_take_the_sum_of_their_times() -> None:
    found = rates("alone", STREAMS)
    assert found["tokens_per_s"] == pytest.approx(30 / 5)
    assert found["first_token_s"] == 1.5
    assert found["tokens"] == 32
    assert found["seconds"] == 8.0


def test_streams_at_once_count_from_the_first_token_of_any_to_the_last() -> None:
    found = rates("together", STREAMS)
    assert found["tokens_per_s"] == pytest.approx(30 / 4)
    assert found["seconds"] == 5.0
