"""Before and after fine-tuning: the same search and proof with an adapter in the weights."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import exp
from pathlib import Path

from torch import Tensor

from swlora.adapters.merged_in_memory import adapter_merged, check_mergeable
from swlora.adapters.on_base import warn_of_other_base
from swlora.adapters.saved import WEIGHTS
from swlora.config import IdentifySpec
from swlora.files import sha256_of
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.models.identity import weights_sample_sha256
from swlora.models.load import LoadedModel
from swlora.progress import Progress
from swlora.superweights.findings import FineTuned, Identified, MovedActivation, MovedWeight
from swlora.superweights.identify import identify, make_meter
from swlora.superweights.meter import rise_nats
from swlora.superweights.proof import Verdict
from swlora.superweights.sinks import Sinks, measure_sinks

Found = dict[WeightAddress, tuple[float, float, Verdict | None]]  # weight, ratio, verdict


def check_merging(loaded: LoadedModel, folder: Path, say: Callable[[str], None]) -> str:
    """Refuse an adapter that does not fit the model's weights, before any work; return its sha256.

    Says so where it was trained on other weights. Raises UserError.
    """
    warn_of_other_base(folder, loaded.source, weights_sample_sha256(loaded.model), say)
    check_mergeable(loaded.model, folder)
    return sha256_of(folder / WEIGHTS)


def with_fine_tuned(
    before: Identified,
    loaded: LoadedModel,
    folder: Path,
    spec: IdentifySpec,
    windows: Tensor,
    *,
    seed: int,
    progress: Progress,
) -> Identified:
    """Return what was found before, with what is found once the adapter in `folder` is merged.

    Every weight that is proved in one of both is measured in the other too. The model is afterwards
    without the adapter, bit for bit. Raises UserError where the adapter does not fit the model.
    """
    named = replace(loaded, source=f"{loaded.source}, with the adapter in {folder}")
    with adapter_merged(loaded.model, folder):
        progress.say(f"the same with the adapter in {folder}")
        after = identify(named, spec, windows, seed=seed, progress=progress)
        proven = list(dict.fromkeys([*_proven(before), *_proven(after)]))
        found_after = _found(loaded, after, proven, windows)
        sinks_after = _sinks(loaded, after, windows)
    found_before = _found(loaded, before, proven, windows)
    tuned = FineTuned(
        adapter=str(folder),
        weights=tuple(_moved(a, found_before, found_after) for a in proven),
        activations=tuple(
            MovedActivation(b.prompt, b.has_bos, b.activation, a.activation)
            for b, a in zip(before.search.settings, after.search.settings, strict=True)
        ),
        sinks_before=_sinks(loaded, before, windows),
        sinks_after=sinks_after,
        after=after,
    )
    return replace(before, fine_tuned=tuned)


def _proven(found: Identified) -> Iterable[WeightAddress]:
    return (c.address for c in found.candidates if c.is_proved)


def _found(
    loaded: LoadedModel, result: Identified, addresses: list[WeightAddress], windows: Tensor
) -> Found:
    """Return weight, ratio and verdict of every address; measured where it is no candidate."""
    found: Found = {
        c.address: (c.seen.weight, c.proof.ratio, c.proof.verdict) for c in result.candidates
    }
    if missing := [address for address in addresses if address not in found]:
        meter = make_meter(loaded.model, windows)
        base = meter.measure({})
        for address in missing:
            weight = float(meter.anatomy.weight_view(address))
            found[address] = weight, exp(rise_nats(base, meter.ablate([address]))), None
    return found


def _moved(address: WeightAddress, before: Found, after: Found) -> MovedWeight:
    (weight_before, ratio_before, verdict_before) = before[address]
    (weight_after, ratio_after, verdict_after) = after[address]
    return MovedWeight(
        address=address,
        weight_before=weight_before,
        weight_after=weight_after,
        ratio_before=ratio_before,
        ratio_after=ratio_after,
        verdict_before=verdict_before,
        verdict_after=verdict_after,
    )


def _sinks(loaded: LoadedModel, found: Identified, windows: Tensor) -> Sinks:
    if found.mechanism:
        return found.mechanism.sinks
    return measure_sinks(Anatomy(loaded.model), windows)
