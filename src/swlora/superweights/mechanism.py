"""How proved weights work: what attention, a constant, other doses and rounding have to do with it.

Measured of proved weights alone, since these questions are about what a weight does. Attention and
constants are measured always: they take about four passes over the text for each weight. Rounding
takes twelve, and text at every dose many short ones; both are asked for (`deep`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.models.load import LoadedModel
from swlora.progress import Progress
from swlora.result_json import FLAT, IF_ANY
from swlora.superweights.ablate import zeroed
from swlora.superweights.effects import CHECKED_TOKENS, DoseText, dose_texts
from swlora.superweights.mean_product import MeanRestored, restore_mean
from swlora.superweights.meter import Meter
from swlora.superweights.rounding import Rounded, measure_rounding
from swlora.superweights.sinks import Sinks, measure_sinks


@dataclass(frozen=True)
class WeightMechanism:
    """Of one weight: the sinks with it at zero, and its mean in its place.

    `mean` is None where there is one window of text alone.
    """

    address: WeightAddress = field(metadata=FLAT)
    sinks: Sinks
    mean: MeanRestored | None


@dataclass(frozen=True)
class Mechanism:
    """Of all proved weights, the leading one first; `sinks` are those of the intact model.

    `rounding` holds all of them out together; `dose_texts` are of the leading one. Both are None
    where they were not asked for.
    """

    sinks: Sinks
    weights: tuple[WeightMechanism, ...]
    rounding: tuple[Rounded, ...] | None = field(default=None, metadata=IF_ANY)
    dose_texts: tuple[DoseText, ...] | None = field(default=None, metadata=IF_ANY)


def measure_mechanism(
    loaded: LoadedModel,
    meter: Meter,
    proven: Sequence[WeightAddress],
    prompts: Sequence[str],
    *,
    deep: bool,
    progress: Progress,
) -> Mechanism:
    """Measure how proved weights work; `prompts` are continued at every dose of the first one.

    The model is afterwards what it was, bit for bit.
    """
    anatomy = Anatomy(loaded.model)
    rounding = texts = None
    with progress.task("attention and constants", 1 + 2 * len(proven)) as task:
        sinks = measure_sinks(anatomy, meter.windows)
        task.advance(1, "the model as it is")
        weights = []
        for address in proven:
            with zeroed(anatomy, [address]):
                of_zeroed = measure_sinks(anatomy, meter.windows)
            task.advance(1, f"{address} at zero")
            mean = restore_mean(meter, address) if meter.n_windows > 1 else None
            task.advance(1, f"the mean of {address}")
            weights.append(WeightMechanism(address, of_zeroed, mean))
    if deep:
        rounding = measure_rounding(meter, proven, progress)
        texts = dose_texts(
            loaded.model,
            loaded.tokenizer,
            [p for p in prompts if _has_room(loaded, p)],
            proven[0],
            end_token_ids=loaded.end_token_ids,
            progress=progress,
        )
    return Mechanism(sinks, tuple(weights), rounding, texts)


def _has_room(loaded: LoadedModel, prompt: str) -> bool:
    n_tokens = len(loaded.tokenizer(prompt, verbose=False).input_ids)
    return n_tokens <= loaded.context_tokens - CHECKED_TOKENS
