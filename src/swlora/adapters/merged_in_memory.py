"""An adapter in a model's own weights for as long as a body runs.

Unlike `adapter_on`, no module of PEFT is in the model meanwhile: whatever reads or changes single
weights sees those of base and adapter together.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from swlora.adapters.mergeable import merge_refusal
from swlora.adapters.merged_weights import MergedWeights
from swlora.adapters.saved import WEIGHTS, adapter_folder, read_config, what_is_not_finite
from swlora.errors import UserError


def mergeable_folder(path: Path) -> Path:
    """Return the adapter folder that `path` is, or, for a run folder, holds.

    Raises UserError where it holds no adapter, or one that cannot be added to weights.
    """
    folder = adapter_folder(path)
    if reason := merge_refusal(read_config(folder)):
        raise UserError(f"the adapter in {folder} cannot be merged: {reason}")
    return folder


def check_mergeable(model: Any, folder: Path) -> None:
    """Raise UserError where `adapter_merged` would, without adding anything: by shapes and names.

    What is left to it is a sum of finite numbers that is not finite.
    """
    _planned(model, folder)
    if said := what_is_not_finite(folder / WEIGHTS):
        raise UserError(f"the adapter in {folder} cannot be merged: it {said}")


@contextmanager
def adapter_merged(model: Any, folder: Path) -> Iterator[None]:
    """Add an adapter to the weights of `model` while the body runs; then they are what they were.

    Computed in float32 and rounded to each weight's dtype. Raises UserError where the adapter does
    not fit, or changes a weight that embeddings and head share: they would no longer be one.
    """
    merging = _planned(model, folder)
    with ExitStack() as stack:
        for name in merging.changed:
            parameter = model.get_parameter(name)
            own = parameter.data
            stack.callback(setattr, parameter, "data", own)
            parameter.data = merging.merged(name, own.cpu()).to(own)
        yield


def _planned(model: Any, folder: Path) -> MergedWeights:
    """Return what an adapter changes in `model`; UserError where that cannot be done in memory."""
    merging = MergedWeights(folder, model)
    merging.check_own(lambda name: model.get_parameter(name).data.cpu())
    tied: dict[str, str] = model.all_tied_weights_keys
    for name in merging.changed:
        if name in {*tied.keys(), *tied.values()}:
            raise UserError(
                f"the adapter in {folder} changes {name}, which embeddings and head share; "
                "swlora merge makes a model of it, in which they are two"
            )
    return merging
