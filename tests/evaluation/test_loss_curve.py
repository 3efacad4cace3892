"""The course of a training: its smoothing by arithmetic, its figure as it is drawn."""

import struct
from pathlib import Path
from typing import Any

import pytest

from swlora.errors import RunFailedError
from swlora.evaluation.loss_curve import draw_loss, final_loss, smoothed

Lines = dict[str, tuple[list[float], list[float]]]


def test_smoothing_is_the_mean_around() -> None:
    points = [(float(k), float(k * k % 7)) for k in range(50)]
    reach = 2  # half of 8 % of 50
    smooth = smoothed(points, share=0.08)
    for k, (x, y) in enumerate(smooth):
        around = [v for _, v in points[max(0, k - reach) : k + reach + 1]]
        assert (x, y) == (k, pytest.approx(sum(around) / len(around)))


@pytest.mark.parametrize("n", [1, 2, 24, 60, 500])
def test_what_falls_evenly_ends_where_its_steps_end(n: int) -> None:
    """The mean of the last steps lags by a fiftieth of the way, whatever the number of steps."""
    ends = smoothed([(k, 3.0 - k / n) for k in range(n)])[-1]
    assert ends[0] == n - 1
    assert ends[1] == pytest.approx(3.0 - (n - 1 - round(0.02 * n) / 2) / n)


@pytest.mark.parametrize(("n", "n_last"), [(1, 1), (4, 1), (10, 1), (26, 3), (100, 10)])
def test_the_final_loss_is_the_token_mean_of_the_last_tenth(n: int, n_last: int) -> None:
    metrics = [{"loss": k / (k + 1), "sum_nats": float(k), "n_tokens": k + 1} for k in range(n)]
    sums = range(n - n_last, n)
    assert final_loss(metrics) == (pytest.approx(sum(sums) / sum(k + 1 for k in sums)), n_last)


def drawn_lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Return what will be drawn, by label."""
    from matplotlib.axes import Axes

    drawn: Lines = {}
    plot = Axes.plot

    def recording(self: Axes, x: list[float], y: list[float], **style: Any) -> Any:
        drawn[style["label"]] = list(x), list(y)
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", recording)
    return drawn


def test_the_figure_is_a_png_of_the_given_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_lines(monkeypatch)
    metrics = [{"rows": 8 * k, "loss": 60 / k} for k in range(1, 61)]
    draw_loss(metrics, tmp_path / "loss.png")
    rows = list(range(8, 8 * 61, 8))
    assert drawn["each step"] == (rows, [60 / k for k in range(1, 61)])
    assert drawn["smoothed"][0] == rows
    assert drawn["smoothed"][1][-1] == pytest.approx((60 / 59 + 1) / 2)
    assert drawn["smoothed"][1][29] == pytest.approx((60 / 29 + 2 + 60 / 31) / 3)
    assert set(drawn) == {"each step", "smoothed"}
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 500
    assert height > 300


def test_held_out_losses_are_a_line_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_lines(monkeypatch)
    metrics: list[dict[str, Any]] = [{"rows": k, "loss": 1.0} for k in range(1, 7)]
    metrics[1]["eval_nll"], metrics[5]["eval_nll"] = 2.5, 2.25
    draw_loss(metrics, tmp_path / "loss.png")
    assert drawn["held-out rows"] == ([2, 6], [2.5, 2.25])


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match="cannot write"):
        draw_loss([{"rows": 1, "loss": 1.0}], tmp_path / "file" / "loss.png")
