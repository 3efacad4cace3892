"""The rows of the scenarios: lengths and sharing as they are stated, the same from one seed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.scenario_data import SCENARIOS, Scenario, Writer
from benchmarks.token_rows import IGNORED, TokenRows

from swlora.data.prefix_tree import count_group_nodes, count_nodes
from swlora.data.token_sequences import TokenSequences

MADE = [name for name, scenario in SCENARIOS.items() if scenario.make]


@pytest.fixture(scope="module")
def tokenizer(builtin_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin_dir)


def made(name: str, tokenizer: Any) -> TokenRows:
    return SCENARIOS[name].rows(tokenizer, quick=True)


def by_row(rows: TokenRows) -> list[list[int]]:
    return [rows.tokens[a:b].tolist() for a, b in pairwise(rows.offsets)]


def sequences(rows: TokenRows) -> TokenSequences:
    return TokenSequences(rows.tokens, rows.offsets, rows.trained)


def n_common(rows: list[list[int]]) -> int:
    columns = zip(*rows, strict=False)
    return next(i for i, column in enumerate(columns) if len(set(column)) > 1)


@pytest.mark.parametrize("name", MADE)
def test_a_seed_makes_the_same_rows_and_another_does_not(name: str, tokenizer: Any) -> None:
    scenario = SCENARIOS[name]
    first, again = (scenario.rows(tokenizer, quick=True) for _ in range(2))
    other = scenario.rows(tokenizer, quick=True, seed=1)
    assert len(first) == scenario.n_rows(quick=True)
    for key in ("tokens", "offsets", "trained"):
        assert np.array_equal(getattr(first, key), getattr(again, key))
    assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("name", MADE)
def test_every_row_has_a_prompt_and_ends_with_what_is_trained(name: str, tokenizer: Any) -> None:
    rows = made(name, tokenizer)
    assert rows.trained[rows.offsets[1:] - 1].all()
    assert not rows.trained[rows.offsets[:-1]].any()


@pytest.mark.parametrize(("name", "n_tokens"), [("tokens-500", 500), ("tokens-2000", 2000)])
def test_unshared_rows_are_as_long_as_stated_and_share_nothing(
    name: str, n_tokens: int, tokenizer: Any
) -> None:
    rows = made(name, tokenizer)
    assert set(rows.lengths) == {n_tokens}
    assert rows.trained.sum() == len(rows) * n_tokens / 5
    assert count_nodes(sequences(rows)) == len(rows) * (n_tokens - 1)


def test_the_system_prompt_has_300_tokens_that_all_rows_share(tokenizer: Any) -> None:
    rows = made("system-prompt", tokenizer)
    beginning = by_row(rows)[0][:300]
    assert all(row[:300] == beginning for row in by_row(rows))
    text = tokenizer.decode(beginning)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n")
    assert 300 <= n_common(by_row(rows)) <= 306  # and the header of the user's turn
    assert 320 < np.mean(rows.lengths) < 360


def test_eight_answers_follow_each_prompt_of_512_tokens(tokenizer: Any) -> None:
    rows = by_row(made("answers", tokenizer))
    prompts = [tuple(row[:512]) for row in rows]
    assert len(set(prompts)) == len(rows) / 8
    assert all(len(set(prompts[i : i + 8])) == 1 for i in range(0, len(rows), 8))
    assert tokenizer.decode(rows[0][:512]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len({tuple(row) for row in rows}) == len(rows)
    # A group of eight: the prompt once, and of each answer all but its last token, which share
    # the words with which they happen to begin.
    group = sequences(made("answers", tokenizer).first(8))
    most = 512 + int((group.lengths - 512 - 1).sum())
    n_nodes = int(count_group_nodes(group, [np.arange(8)])[0])
    assert 0.9 * most < n_nodes <= most


def test_all_answers_of_a_chat_are_trained_with_their_end(tokenizer: Any) -> None:
    rows = made("turns", tokenizer)
    for a, b in pairwise(rows.offsets):
        tokens, trained = rows.tokens[a:b], rows.trained[a:b]
        starts = np.flatnonzero(np.diff(np.concatenate([[0], trained, [0]])) == 1)
        ends = np.flatnonzero(np.diff(np.concatenate([[0], trained, [0]])) == -1)
        assert len(starts) == 4
        for start, end in zip(starts, ends, strict=True):
            assert tokenizer.decode(tokens[:start]).endswith("<|im_start|>assistant\n")
            assert tokenizer.decode(tokens[end - 1 : end]) == "<|im_end|>"


def test_a_label_has_two_tokens_and_all_rows_share_the_template(tokenizer: Any) -> None:
    rows = made("labels", tokenizer)
    assert rows.trained.sum() == 2 * len(rows)
    assert n_common(by_row(rows)) >= 150
    labels = {tokenizer.decode(row[-2:]) for row in by_row(rows)}
    assert labels == {f" {word}<|im_end|>" for word in ("yes", "no", "maybe")}


@pytest.mark.parametrize("n", [1, 7, 40])
def test_pieces_have_exactly_the_tokens_asked_for(n: int, tokenizer: Any) -> None:
    writer = Writer(tokenizer, seed=3)
    assert len(writer.words(n)) == n
    assert len(writer.turn_of("system", n + 20)) == n + 20


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_every_arm_is_given_whole_steps(scenario: Scenario) -> None:
    for quick in (True, False):
        for arm in ("ours", "ours-flat", "peft", "unsloth"):
            batch, timed = scenario.amount(arm, quick)
            assert timed >= batch and timed % batch == 0
            assert batch + timed <= scenario.n_rows(quick)


def test_rows_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    rows = TokenRows.from_parts([[([5, 6], False), ([7], True)], [([8], False), ([9, 1], True)]])
    rows.save(tmp_path / "rows.npz")
    read = TokenRows.load(tmp_path / "rows.npz")
    assert read.items() == [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7]},
        {"input_ids": [8, 9, 1], "labels": [IGNORED, 9, 1]},
    ]
    assert read.first(1).items() == rows.items()[:1]
