"""How fast the steps of a training are: nodes and tokens a second, shares of the machine.

    share of peak = necessary FLOPs of a step / its seconds / FLOP/s of the best matrix product
    busy share    = the part of the cores that other programs used lately

The peak is known from an earlier measurement here, or measured once, when a training has run for
PROBE_AFTER_S and other programs leave the cores alone: it takes half a second then, off the clock.
One that a step exceeds was disturbed when it was measured; it is measured once more.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from swlora.matrix_peak import known_peak, measured_peak
from swlora.result_json import IF_ANY
from swlora.threads import OthersShare
from swlora.training.necessary_work import Work

PROBE_AFTER_S = 20.0
QUIET_SHARE = 0.1
SHOWN_BUSY = 0.2  # a share of the cores that a person is told of


@dataclass(frozen=True)
class MeanPace:
    """The means over a training, by its seconds: None where nothing was measured.

    `nodes_per_s` are positions that are run, `tokens_per_s` those that they stand for.
    """

    nodes_per_s: float | None = field(default=None, metadata=IF_ANY)
    tokens_per_s: float | None = field(default=None, metadata=IF_ANY)
    peak_share: float | None = field(default=None, metadata=IF_ANY)
    busy_share: float | None = field(default=None, metadata=IF_ANY)


def mean_pace(metrics: Sequence[Mapping[str, Any]]) -> MeanPace:
    """Return the means of what the steps report."""
    times_s, before_s = [], 0.0
    for row in metrics:
        times_s.append(row["elapsed_s"] - before_s)
        before_s = row["elapsed_s"]

    def mean(name: str) -> float | None:
        pairs = [(row[name], t) for row, t in zip(metrics, times_s, strict=True) if name in row]
        total_s = sum(t for _, t in pairs)
        return sum(value * t for value, t in pairs) / total_s if total_s > 0 else None

    return MeanPace(*(mean(f.name) for f in fields(MeanPace)))


class Pace:
    """Measures steps of a step function whose `work` says what it has run; others have none.

    Where several processes do a step, each knows its own work alone, and nothing is said of it.
    """

    def __init__(
        self, step_function: Any, weight: torch.Tensor, others: OthersShare | None
    ) -> None:
        work = getattr(step_function, "work", None)
        self._work = work if isinstance(work, Work) else None
        self._dtype, self._device = weight.dtype, str(weight.device)
        self._others, self._elapsed_s = others, 0.0
        self._peak: float | None = None
        self._is_looked_up = self._can_measure = self._is_measured = False
        self._before = (0, 0, 0.0)

    def begin(self) -> None:
        """Note where the work stands before a step."""
        if work := self._work:
            self._before = work.n_nodes, work.n_tokens, work.flops or 0.0

    def of_step(self, step_s: float) -> dict[str, Any]:
        """Return what is reported of a step that took so long."""
        found: dict[str, Any] = {}
        busy_share = self._others.look() if self._others else None
        if busy_share is not None:
            found["busy_share"] = round(busy_share, 4)
        self._elapsed_s += step_s
        if (work := self._work) is None:
            return found
        nodes, tokens, flops = self._before
        found["nodes"], found["tokens"] = work.n_nodes - nodes, work.n_tokens - tokens
        found["nodes_per_s"] = found["nodes"] / step_s
        found["tokens_per_s"] = found["tokens"] / step_s
        if work.flops is not None and (peak := self._known_peak(busy_share)):
            share = (work.flops - flops) / step_s / peak
            if share <= 1:
                found["peak_share"] = share
            else:
                self._peak, self._can_measure = None, not self._is_measured
        return found

    def _known_peak(self, busy_share: float | None) -> float | None:
        if not self._is_looked_up:
            self._peak, self._is_looked_up = known_peak(self._dtype, self._device), True
            self._can_measure = self._peak is None
        is_quiet = busy_share is not None and busy_share < QUIET_SHARE
        if self._can_measure and self._elapsed_s > PROBE_AFTER_S and is_quiet:
            self._can_measure, self._is_measured = False, True
            with suppress(RuntimeError):  # the training has all memory, and goes on
                self._peak = measured_peak(self._dtype, self._device)
        return self._peak
