"""The whole state of a training loop as one object, saved and loaded through the run folder.

Trained weights, what else the method keeps, optimizer moments, the random generator, the held-out
losses and the position in the data; learning rate and data order are pure functions of (seed,
step), so they need no state. A run that resumes here does the same arithmetic as one that never
stopped, after a kill too; only in float32 another number of threads sums in another order.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swlora.adapters.adapted import Adapted
from swlora.config import TrainSpec
from swlora.errors import RunFailedError
from swlora.processes import from_main, world
from swlora.processes.tensors import tensors_from_main
from swlora.run_record import RunRecord
from swlora.snapshots import Snapshot, load_snapshot, remove_other_snapshots, save_snapshot
from swlora.training.watch import HeldOutState


@dataclass
class Totals:
    """What a loop has done so far."""

    step: int = 0
    rows: int = 0
    tokens: float = 0  # by their weights
    elapsed_s: float = 0.0
    skipped: int = 0  # steps among them that left the weights as they were


@dataclass
class LoopState:
    """Live references to everything that a resumed run needs."""

    adapted: Adapted
    optimizer: torch.optim.Optimizer
    totals: Totals = field(default_factory=Totals)
    held_out: HeldOutState = field(default_factory=HeldOutState)
    number: int = 0  # of the newest snapshot of it
    saved_step: int | None = None

    def random_state(self) -> dict[str, Tensor]:
        """Return where the random generators stand."""
        tensors = {"rng": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self._device)
        return tensors

    def set_random_state(self, tensors: dict[str, Tensor]) -> None:
        """Put the random generators back to where `random_state` found them."""
        torch.set_rng_state(tensors["rng"].cpu())
        if self._device.type == "cuda" and "rng_cuda" in tensors:  # none where it began on a CPU
            torch.cuda.set_rng_state(tensors["rng_cuda"].cpu(), self._device)

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """Leave the random generators as they are, whatever the body draws."""
        before = self.random_state()
        try:
            yield
        finally:
            self.set_random_state(before)

    def save(self, folder: Path, keep: int = 1) -> None:
        """Save this state in `folder`; the `keep` - 1 that were saved before it stay."""
        # Copied where they are not, since a device that trains has no room for a second of each.
        tensors = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()
        }
        save_snapshot(folder, Snapshot(self.number + 1, tensors, self._values()), keep)
        self.number, self.saved_step = self.number + 1, self.totals.step

    def load(self, folder: Path, say: Callable[[str], None]) -> bool:
        """Fill this state from the newest whole snapshot in `folder`; False where there is none.

        `say` is told why a newer one was left out. Raises RunFailedError where the snapshot holds
        other parameters, or where all are damaged.
        """
        snapshot = load_snapshot(folder, say)
        if snapshot is None:
            return False
        tensors, values = snapshot.tensors, snapshot.values
        own = {f"parameter/{name}": p.shape for name, p in self.adapted.parameters.items()}
        if own != {n: t.shape for n, t in tensors.items() if n.startswith("parameter/")}:
            raise RunFailedError(f"the checkpoint in {folder} belongs to another adapter")
        self._take(tensors, values)
        self.number, self.saved_step = snapshot.number, self.totals.step
        return True

    def share(self) -> None:
        """Have the state of the first process in all of them."""
        if not world().is_shared:
            return
        tensors = tensors_from_main(self._tensors(), self._device)
        values = from_main(self._values)
        if not world().is_main:
            self._take(tensors, values)

    def _tensors(self) -> dict[str, Tensor]:
        """Return all that is a tensor of this state, without copying it, under the names saved."""
        tensors = self.random_state()
        for name, tensor in self.adapted.state().items():
            tensors[f"method/{name}"] = tensor.detach()
        for name, parameter in self.adapted.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        return tensors

    def _values(self) -> dict[str, Any]:
        """Return the numbers of this state as JSON's values."""
        return {**vars(self.totals), "held_out": vars(self.held_out)}

    def _take(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Fill this state from what `_tensors` and `_values` gave."""
        self.set_random_state(tensors)
        with torch.no_grad():
            for name, parameter in self.adapted.parameters.items():
                parameter.copy_(tensors[f"parameter/{name}"])
                self._load_optimizer_state(name, parameter, tensors)
        kept = {n.removeprefix("method/"): t for n, t in tensors.items() if n.startswith("method/")}
        self.adapted.load_state(kept)
        self.held_out = HeldOutState(**values.pop("held_out", {}))  # older ones have none
        self.totals = Totals(**values)

    @property
    def is_saved(self) -> bool:
        """Whether the newest snapshot is of the step that this state is of."""
        return self.saved_step == self.totals.step

    @property
    def _device(self) -> torch.device:
        return next(iter(self.adapted.parameters.values())).device

    def _load_optimizer_state(
        self, name: str, parameter: nn.Parameter, tensors: dict[str, Tensor]
    ) -> None:
        state = self.optimizer.state[parameter]
        for full_name, value in tensors.items():
            kind, _, rest = full_name.partition("/")
            key, _, owner = rest.partition("/")
            if kind == "optimizer" and owner == name:
                state[key] = value.to(parameter.device, copy=True)


class Checkpoints:
    """Writes the state of a loop into its run, where there is a place for it."""

    def __init__(self, state: LoopState, run: RunRecord, spec: TrainSpec) -> None:
        self._state, self._run, self._spec = state, run, spec
        self._saved_at_s = time.perf_counter()

    def after_step(self, *, at_once: bool) -> None:
        """Save where it is time to, or `at_once`."""
        since_s = time.perf_counter() - self._saved_at_s
        if at_once or self._spec.saving.is_due(self._state.totals.step, since_s):
            self.save()

    def save(self) -> None:
        """Save the state, unless it is saved already, after the reports of its steps.

        Where it is, a kill may have come before the snapshots that it replaces were removed.
        """
        folder, keep = self._run.checkpoint, self._spec.keep_checkpoints
        if folder and not self._state.is_saved:
            self._run.sync()
            self._state.save(folder, keep)
        elif folder:
            remove_other_snapshots(folder, self._state.number, keep)
        self._saved_at_s = time.perf_counter()


def steps_done(folder: Path | None) -> int:
    """Return the steps that the newest whole snapshot has behind it; 0 where there is none."""
    snapshot = load_snapshot(folder, lambda _: None) if folder else None
    return int(snapshot.values["step"]) if snapshot else 0
