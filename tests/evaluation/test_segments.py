"""What was measured of each prompt: kept exactly, resampled as if the texts were scored again."""

import json
from pathlib import Path

import numpy as np
import pytest

from swlora.errors import UserError
from swlora.evaluation.bootstrap import prompt_weights
from swlora.evaluation.meteor import METEOR_COLUMNS
from swlora.evaluation.scores import Rows, SegmentStatistics, segment_statistics
from swlora.evaluation.segments import FILE, Segments
from swlora.loss_sum import LossSum

PREDICTIONS = ["the pub is near the river", "a cafe", "Aromi serves food for adults", "it is"]
REFERENCES = [
    ["the pub is by the river", "a pub near the river"],
    ["Aromi is a cafe"],
    ["Aromi serves food for adults today", "food for adults at Aromi", "Aromi serves food"],
    ["it is not a pub", "it is a pub"],
]
LOSSES = [LossSum(10.5, 4), LossSum(1 / 3, 1), LossSum(7.0, 9), LossSum(2.25, 3)]


def make_segments(with_meteor: bool = False) -> Segments:
    statistics = segment_statistics(PREDICTIONS, REFERENCES, java=False)
    if with_meteor:
        rows = np.random.default_rng(1).random((4, METEOR_COLUMNS))
        statistics = SegmentStatistics(
            **{**vars(statistics), "meteor": rows, "meteor_reason": None, "tokenizer": "java"}
        )
    return Segments.of(statistics, LOSSES)


@pytest.mark.parametrize("with_meteor", [False, True])
def test_what_is_written_is_read_back_exactly(tmp_path: Path, with_meteor: bool) -> None:
    segments = make_segments(with_meteor)
    segments.write(tmp_path)
    back = Segments.read(tmp_path)
    assert len(back) == 4
    weights = np.random.default_rng(0).multinomial(4, np.full(4, 0.25), size=7).astype(float)
    for name, values in segments.resampled(weights).items():
        assert back.resampled(weights)[name].tolist() == values.tolist()
    assert back.statistics.scores() == segments.statistics.scores()
    assert (back.statistics.meteor is None) != with_meteor


def test_intervals_are_the_middle_of_scoring_drawn_prompts_again() -> None:
    """The obvious loop over draws."""
    segments = make_segments(with_meteor=True)
    found = segments.intervals()
    draws = [segments.statistics.corpus(repeated(row)) for row in prompt_weights(4)]
    for name, bounds in found.items():
        if name != "NLL":
            expected = np.quantile([draw[name] for draw in draws], [0.025, 0.975])
            assert bounds == pytest.approx(expected.tolist())
    assert set(found) == {"BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "NLL"}
    assert found["NLL"][0] < sum(LOSSES, LossSum()).nats_per_token < found["NLL"][1]
    one = Segments.of(segment_statistics(["a"], [["a b"]], java=False), LOSSES[:1])
    assert one.intervals() == {}  # draws of a single prompt are all the same


def repeated(weights: Rows) -> np.ndarray:
    return np.repeat(np.arange(4), weights.astype(int))


def test_resampling_equals_scoring_the_repeated_segments() -> None:
    segments = make_segments(with_meteor=True)
    weights = np.array([[1, 1, 1, 1], [0, 0, 3, 1], [2, 0, 2, 0], [0, 4, 0, 0.0]])
    found = segments.resampled(weights)
    assert set(found) == {"BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "NLL"}
    for k, row in enumerate(weights):
        chosen = repeated(row)
        expected = segments.statistics.corpus(chosen)
        total = sum((LOSSES[i] for i in chosen), LossSum())
        expected["NLL"] = total.nats_per_token
        assert {name: values[k] for name, values in found.items()} == pytest.approx(expected)


def test_a_resample_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no segments"):
        make_segments().resampled(np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]]))


def test_unequal_numbers_of_losses_and_segments() -> None:
    with pytest.raises(ValueError, match="3 losses for 4 segments"):
        Segments.of(make_segments().statistics, LOSSES[:3])


def test_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable segments"):
        Segments.read(tmp_path)
    make_segments().write(tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(values | {"sum_nats": [1.0]}))
    with pytest.raises(UserError, match=r"lengths \[1, 4\]"):
        Segments.read(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({k: v for k, v in values.items() if k != "bleu"}))
    with pytest.raises(UserError, match="evaluate that run again"):
        Segments.read(tmp_path)
