"""What an arm will need of memory: above what was measured, and a refusal that says what fits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.arms import SCENARIO_ARMS
from benchmarks.memory_needs import LIBRARIES_BYTES, Shape, needed_bytes, refusal
from benchmarks.random_model import SHAPES, config_of
from benchmarks.scenario_data import SCENARIOS
from benchmarks.token_rows import TokenRows
from transformers import AutoConfig

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
MADE = {"system-prompt", "answers", "tokens-2000", "labels"}


def shape_of(config: object) -> Shape:
    return Shape(config, value_bytes=2, weights_bytes=270_000_000, adapter_bytes=20_000_000)


def rows_of(n: int, n_tokens: int) -> TokenRows:
    """Rows that share nothing."""
    return TokenRows.from_parts([[([1000 + i, *range(n_tokens - 2)], False), ([5], True)]
                                 for i in range(n)])  # fmt: skip


def test_the_shape_counts_weights_and_adapters(builtin_dir: Path) -> None:
    found = Shape.of(str(builtin_dir))
    assert found.weights_bytes == 134_515_008 * found.value_bytes
    projections = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert found.adapter_bytes == 4 * 4 * 30 * 4 * projections


def test_the_trainers_bound_is_above_what_was_measured(builtin_dir: Path) -> None:
    """And not far above, so that little is refused that would fit."""
    measured = json.loads((RESULTS / "scenarios-quick.json").read_text())["scenarios"]
    config, compared = AutoConfig.from_pretrained(builtin_dir), 0
    for name in MADE & set(measured):
        batch = SCENARIOS[name].peer_batch
        rows = rows_of(batch, round(measured[name]["tokens_a_row"]))
        for arm in ("peft", "unsloth"):
            peak = measured[name]["arms"][arm]["peak_bytes"]
            needed = needed_bytes(replace(SCENARIO_ARMS[arm], batch=batch), shape_of(config), rows)
            assert peak < needed < 1.6 * peak, (name, arm, peak / 1e9, needed / 1e9)
            compared += 1
    assert compared == 8


@pytest.mark.parametrize("kind", ["ours", "ours-flat", "peft", "trl", "unsloth"])
def test_less_is_needed_of_few_layers_and_of_few_rows(kind: str) -> None:
    arm = replace(SCENARIO_ARMS[kind], batch=4)
    shape, rows = shape_of(config_of(SHAPES["1.1B"])), rows_of(4, 512)
    whole = needed_bytes(arm, shape, rows)
    last = needed_bytes(replace(arm, layers=(18, 19, 20, 21)), shape, rows)
    one = needed_bytes(replace(arm, batch=1), shape, rows)
    assert LIBRARIES_BYTES + shape.weights_bytes < last < 0.5 * whole
    assert one < 0.5 * whole


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    arm = replace(SCENARIO_ARMS["peft"], batch=8)
    shape, rows = shape_of(config_of(SHAPES["1.1B"])), rows_of(8, 512)
    by_rows = {n: needed_bytes(replace(arm, batch=n), shape, rows) for n in range(1, 9)}
    assert refusal(arm, shape, rows, by_rows[8]) is None
    said = refusal(arm, shape, rows, by_rows[8] - 1)
    assert said is not None and said.endswith("free; 7 would fit")
    said = refusal(arm, shape, rows, by_rows[3])
    assert said is not None and said.startswith("not started: 8 rows a step would need about ")
    assert said.endswith("free; 3 would fit")
    assert str(refusal(arm, shape, rows, by_rows[1] - 1)).endswith("not even one would fit")


def test_shared_prompts_need_less_of_ours_alone() -> None:
    shape = shape_of(config_of(SHAPES["1.1B"]))
    shared = TokenRows.from_parts([[(list(range(500)), False), ([600 + i], True)]
                                   for i in range(4)])  # fmt: skip
    apart = rows_of(4, 501)
    for kind, is_less in (("ours", True), ("ours-flat", False), ("peft", False)):
        arm = replace(SCENARIO_ARMS[kind], batch=4)
        less, more = (needed_bytes(arm, shape, rows) for rows in (shared, apart))
        assert (less < 0.5 * more) == is_less and (is_less or less == more)
