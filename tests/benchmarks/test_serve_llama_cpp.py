"""Rates of streams by hand: the wait for a first token is no part of them."""

import pytest
from benchmarks.serve_llama_cpp import main, rates

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


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--prompts=long,medium", "no kind of prompts is called 'medium'; there are short, long"),
        ("--shapes=2B", "no shape is called '2B'; there are builtin, 0.36B"),
    ],
)
def test_what_is_not_known_is_named_before_anything_runs(
    option: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["serve_llama_cpp", "--json", "x.json", option])
    with pytest.raises(SystemExit, match=said):
        main()
