"""A meter whose windows of text are dealt to several processes."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from swlora.models.anatomy import WeightAddress
from swlora.processes import gathered, team
from swlora.superweights.meter import BlockLosses, Changes, Meter, changes_of


class DealtMeter(Meter):
    """Measures as `Meter` does: all windows by all processes together, the first ones by each.

    All processes must measure the same over all windows, in the same order; what is measured over
    the first windows alone (`n_windows`) is not exchanged, so that each may measure something else.
    """

    def __init__(self, model: Any, windows: Tensor) -> None:
        super().__init__(model, windows)
        us = team()
        bounds = np.arange(us.size + 1) * len(windows) // us.size
        own = windows[bounds[us.rank] : bounds[us.rank + 1]]
        self._model, self._own = model, Meter(model, own) if len(own) else None
        self._of_first: dict[int, Meter] = {}
        self._of_all: dict[Changes, BlockLosses] = {}

    def measure(
        self,
        scales: Mapping[WeightAddress, float],
        *,
        n_windows: int | None = None,
        keep: Collection[int] = (),
    ) -> BlockLosses:
        """Return the losses with every addressed scalar times its factor; see `Meter.measure`."""
        if n_windows is not None:
            if n_windows not in self._of_first:
                self._of_first[n_windows] = Meter(self._model, self.windows[:n_windows])
            return self._of_first[n_windows].measure(scales, keep=keep)
        changes = changes_of(scales)
        if changes not in self._of_all:
            own = self._own.measure(scales, keep=keep) if self._own else BlockLosses((), ())
            shares = gathered([own.sums_nats, own.n_tokens])
            sums_nats = tuple(nats for sums, _ in shares for nats in sums)
            n_tokens = tuple(n for _, counts in shares for n in counts)
            self._of_all[changes] = BlockLosses(sums_nats, n_tokens)
        return self._of_all[changes]
