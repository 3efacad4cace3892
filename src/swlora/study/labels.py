"""Labels beside points: each takes the place around its point that covers least.

    cost = LABEL * (area over other labels, points, and outside the panel)
           + (area over lines and error bars) + (distance from the point)     all in pixels

A label that ends up away from its point gets a line to it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float64]
Point = tuple[float, float]

DISTANCES_PX = (9.0, 18.0, 30.0, 45.0, 62.0, 82.0, 105.0, 135.0)
ANGLES = np.pi / 8 * np.array([0, 1, 15, 2, 14, 8, 7, 9, 6, 10, 4, 12, 3, 13, 5, 11])
LEADER_FROM_PX = 25.0
LABEL = 20.0  # how much worse it is to cover a word than to cover a line
POINT_PX, LINE_PX = 6.0, 2.0  # half the width that a point and a line need


def place(
    points: Sequence[Point], sizes: Sequence[Point], words: Pixels, lines: Pixels, panel: Pixels
) -> Pixels:
    """Return the box of every label, (n, 4): left, bottom, right, top in pixels.

    sizes: width and height of each label; words and lines: boxes (m, 4) that are there already;
    panel (4,) the room there is.
    """
    distances = np.repeat(DISTANCES_PX, len(ANGLES))
    placed: list[Pixels] = []
    for point, size in zip(points, sizes, strict=True):
        options = np.concatenate([_around(point, size, distance) for distance in DISTANCES_PX])
        outside = size[0] * size[1] - _overlaps(options, panel[None])[:, 0]
        covered = outside + _overlaps(options, np.concatenate([words, *placed])).sum(axis=1)
        cost = LABEL * covered + _overlaps(options, lines).sum(axis=1) + distances
        placed.append(options[[cost.round(6).argmin()]])  # of equals the first: beside it
    return np.concatenate(placed)


def label_points(
    panel: Any, names: Sequence[str], points: Sequence[Point], colors: Sequence[str]
) -> None:
    """Write `names` beside `points` (data coordinates) of a matplotlib panel."""
    panel.figure.canvas.draw()  # the layout is known from here on
    renderer = panel.figure.canvas.get_renderer()
    where = panel.transData.transform(points)
    there = [text.get_window_extent(renderer).extents for text in panel.texts]
    texts = [
        panel.text(0, 0, name, color=color, fontsize=8, va="bottom")
        for name, color in zip(names, colors, strict=True)
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    words = np.concatenate([_boxes(where, POINT_PX), np.reshape(there, (-1, 4))])
    frame = np.array(panel.get_window_extent(renderer).extents)
    sizes = [(extent.width, extent.height) for extent in extents]
    boxes = place(where, sizes, words, _boxes(_drawn(panel), LINE_PX), frame)
    to_data = panel.transData.inverted().transform
    for text, box, (x, y) in zip(texts, boxes, where, strict=True):
        text.set_position(to_data(box[:2]))
        nearest = np.clip(x, box[0], box[2]), np.clip(y, box[1], box[3])
        if np.hypot(nearest[0] - x, nearest[1] - y) >= LEADER_FROM_PX:
            ends = to_data([(x, y), nearest])
            panel.plot(*ends.T, color=text.get_color(), linewidth=0.5, zorder=1)


def _around(point: Point, size: Point, distance: float) -> Pixels:
    """Return boxes (16, 4) of a size around a point, their nearest side `distance` from it."""
    (x, y), (width, height) = point, size
    left = x + distance * np.cos(ANGLES) + width * (np.cos(ANGLES) - 1) / 2
    bottom = y + distance * np.sin(ANGLES) + height * (np.sin(ANGLES) - 1) / 2
    return np.stack([left, bottom, left + width, bottom + height], axis=1)


def _overlaps(boxes: Pixels, others: Pixels) -> Pixels:
    """Return the common areas (a, b) of boxes (a, 4) and others (b, 4)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.asarray((high - low).clip(min=0).prod(axis=2))


def _boxes(points: Pixels, half_width: float) -> Pixels:
    return np.concatenate([points - half_width, points + half_width], axis=1)


def _drawn(panel: Any) -> Pixels:
    """Return points (n, 2), in pixels, along the lines and error bars of a panel."""
    paths = [line.get_transform().transform(line.get_xydata()) for line in panel.lines]
    for container in panel.containers:
        for bars in container[2]:
            paths += [bars.get_transform().transform(path.vertices) for path in bars.get_paths()]
    return np.concatenate([np.empty((0, 2)), *map(_dense, paths)])


def _dense(path: Pixels) -> Pixels:
    """Return points at most 4 pixels apart along a path (n, 2)."""
    if len(path) < 2:
        return path
    along = np.concatenate([[0.0], np.hypot(*np.diff(path, axis=0).T).cumsum()])
    at = np.linspace(0, along[-1], int(along[-1] / 4) + 2)
    return np.stack([np.interp(at, along, path[:, k]) for k in (0, 1)], axis=1)
