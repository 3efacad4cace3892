"""The weights that a request may switch off: those that were found in this very model.

They come from `identify` runs in the folder of runs, and from what is published for the model. A
finding counts only where the model has that weight with that value, so that one of another model
is never offered.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, weight_out_in
from swlora.models.builtin import unpacked_folder
from swlora.superweights.ablate import zeroed
from swlora.superweights.known import known_weights
from swlora.web.folders import RunFolders, run_result

# What `swlora identify --model builtin` finds, offered also before it was run.
BUILTIN_FINDING = {
    "layer": 11,
    "module": "mlp.down_proj",
    "out_channel": 507,
    "in_channel": 1229,
    "weight": 5.876,
}
VALUE_TOLERANCE = 0.01  # bf16 rounds by 0.4 % at most


@dataclass(frozen=True)
class OfferedWeight:
    """A weight by its id, with what was measured of it (None: not measured here).

    `run` names the run whose result holds the whole proof.
    """

    id: str
    address: WeightAddress
    value: float
    source: str
    run: str | None = None
    ratio: float | None = None
    verdict: str | None = None

    def public(self) -> dict[str, Any]:
        """Return what a client may know."""
        a = self.address
        return {
            "id": self.id,
            "layer": a.layer,
            "module": a.module,
            "out_channel": a.out_channel,
            "in_channel": a.in_channel,
            "weight": self.value,
            "ratio": self.ratio,
            "verdict": self.verdict,
            "source": self.source,
            "run": self.run,
        }


class ServedWeights(Anatomy):
    """The weights of a model, addressable also when adapters wrap its projections later."""

    def __init__(self, model: Any, model_name: str, folders: RunFolders) -> None:
        super().__init__(model)
        self._weights = {(p.layer, p.name): weight_out_in(p.module) for p in self.all_projections()}
        self._model_name, self._folders = model_name, folders
        # As they were when first looked at: a weight that is offered may be zero at times.
        self._values: dict[WeightAddress, float] = {}

    def weight_view(self, address: WeightAddress) -> Tensor:
        """Return the addressed scalar as a 0-dim view; UserError where there is none."""
        weight = self._weights.get((address.layer, address.module))
        if weight is None:
            return super().weight_view(address)  # a slice of experts, which nothing wraps
        n_out, n_in = weight.shape
        if not (0 <= address.out_channel < n_out and 0 <= address.in_channel < n_in):
            raise UserError(f"{address} lies outside the weight of shape [out {n_out}, in {n_in}]")
        return weight[address.out_channel, address.in_channel]

    def offered(self) -> dict[str, OfferedWeight]:
        """Return the weights that may be switched off, by id; those with the best proof first."""
        found: dict[str, OfferedWeight] = {}
        for source, run, finding in self._findings():
            weight = self._checked(source, run, finding)
            if weight is not None and (
                weight.id not in found or (found[weight.id].ratio is None and weight.ratio)
            ):
                found[weight.id] = weight
        best_first = sorted(found.values(), key=lambda w: -(w.ratio or 1.0))
        return {weight.id: weight for weight in best_first}

    @contextmanager
    def switched_off(self, addresses: Sequence[WeightAddress]) -> Iterator[None]:
        """Set weights to zero while the body runs; restored bit for bit."""
        with torch.inference_mode(False), zeroed(self, addresses):
            yield

    def _value(self, address: WeightAddress) -> float:
        if address not in self._values:
            self._values[address] = float(self.weight_view(address))
        return self._values[address]

    def _findings(self) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
        """Yield (source, name of the run, finding)."""
        for run in self._folders.runs().values():
            for candidate in _candidates(run_result(run)):
                yield f"run {run.name}", run.name, candidate
        if self._model_name == str(unpacked_folder()):
            yield "swlora identify --model builtin", None, BUILTIN_FINDING
        for known in known_weights(self._model_name):
            if not known.misprint:
                a = known.address
                where = {"layer": a.layer, "module": a.module}
                where |= {"out_channel": a.out_channel, "in_channel": a.in_channel}
                yield "; ".join(known.sources), None, where

    def _checked(
        self, source: str, run: str | None, finding: dict[str, Any]
    ) -> OfferedWeight | None:
        try:
            address = WeightAddress(
                int(finding["layer"]),
                str(finding["module"]),
                int(finding["out_channel"]),
                int(finding["in_channel"]),
            )
            value = self._value(address)
            recorded = float(finding.get("weight", value))
            ratio, verdict = finding.get("ratio"), finding.get("verdict")
            ratio = None if ratio is None else float(ratio)
        except (KeyError, TypeError, ValueError, UserError):
            return None
        if not math.isclose(value, recorded, rel_tol=VALUE_TOLERANCE):
            return None
        verdict = None if verdict is None else str(verdict)
        return OfferedWeight(weight_id(address), address, value, source, run, ratio, verdict)


def weight_id(address: WeightAddress) -> str:
    """Name a weight in requests: layer:module:out:in."""
    return f"{address.layer}:{address.module}:{address.out_channel}:{address.in_channel}"


def _candidates(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the candidates that an `identify` left in a run's result.json, if it did."""
    found = result.get("identify")
    candidates = found.get("candidates") if isinstance(found, dict) else None
    return [c for c in candidates if isinstance(c, dict)] if isinstance(candidates, list) else []
