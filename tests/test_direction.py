"""Which way metrics get better: losses down, scores up, anything else an error."""

import pytest

from swlora.direction import DIRECTION, higher_is_better, is_better
from swlora.errors import UserError
from swlora.evaluation.scales import SCALES

LOSSES = ("loss", "nll", "perplexity")


@pytest.mark.parametrize(
    "metric", [*DIRECTION, *(name.lower() if name == "NLL" else name for name in SCALES)]
)
def test_losses_go_down_and_scores_up(metric: str) -> None:
    is_loss = metric in LOSSES
    assert higher_is_better(metric) is not is_loss
    assert is_better(metric, 1.0, 2.0) is is_loss
    assert is_better(metric, 2.0, 1.0) is not is_loss
    assert not is_better(metric, 1.0, 1.0)


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(UserError, match="no metric is called 'accuracy'; known are loss, nll"):
        higher_is_better("accuracy")
