"""How proved weights work, as sentences, tables of Markdown and lines of a figure."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from swlora.plural import counted
from swlora.superweights.findings import Identified
from swlora.superweights.mechanism import Mechanism, WeightMechanism
from swlora.superweights.sinks import SINK_SCORE
from swlora.superweights.tables import cell, number, table


def sink_lines(result: Identified) -> dict[str, list[float]]:
    """Return the mass on the first position of every layer, by what the figure calls its line."""
    lines = {}
    if mechanism := result.mechanism:
        lines["the model as it is"] = mechanism.sinks.mass
        lines |= {f"{of.address} at zero": of.sinks.mass for of in mechanism.weights}
    if tuned := result.fine_tuned:
        lines["the model as it is"] = tuned.sinks_before.mass
        lines["with the adapter"] = tuned.sinks_after.mass
        if after := tuned.after.mechanism:
            of_after = {f"with the adapter, {of.address} at zero": of for of in after.weights}
            lines |= {name: of.sinks.mass for name, of in of_after.items()}
    return lines


def mechanism_answer(result: Identified) -> Iterator[str]:
    """Say in a sentence each how every proved weight works."""
    if (mechanism := result.mechanism) is None:
        return
    last = len(mechanism.sinks.mass) - 1
    for of in mechanism.weights:
        if (layer := of.address.layer) < last:
            above = slice(layer + 1, None)
            intact, zeroed = (fmean(x.mass[above]) for x in (mechanism.sinks, of.sinks))
            yield (
                f"attention on the first position, mean over layers {layer + 1} to {last}: "
                f"{intact:.2f}; with {of.address} at zero {zeroed:.2f}"
            )
        if of.mean:
            yield (
                f"the product of {of.address} held at its mean: ratio "
                f"{number(of.mean.ratio_everywhere)} with one mean for all positions, "
                f"{number(of.mean.ratio_by_size)} with one for those where it is large and one for "
                "the rest"
            )


def mechanism_sections(result: Identified) -> Iterator[str]:
    """Return the parts of the report about how proved weights work."""
    if (mechanism := result.mechanism) is None:
        if not any(c.is_proved for c in result.candidates):
            yield "## How proved weights work"
            yield (
                "Not measured: no weight is proved. (Attention, constants in place of the weight, "
                "rounding and other doses are questions about a weight that matters.)"
            )
        return
    yield "## Attention on the first position"
    yield (
        "Mass: the attention that goes to the first position of a window, mean over heads and all "
        "queries, of which the first sees nothing else. Sinks: the share of heads in which it "
        f"exceeds {SINK_SCORE:g} (arXiv 2410.10781, section 3.2). On "
        f"{counted(result.setup.n_windows, 'window')} of {result.setup.window_tokens} tokens; "
        "compare equal windows only."
    )
    yield _sink_table(mechanism)
    yield from _means(result, mechanism.weights)
    yield from _rounding(mechanism)
    yield from _dose_texts(mechanism)


def _sink_table(mechanism: Mechanism) -> str:
    models = [mechanism.sinks, *(of.sinks for of in mechanism.weights)]
    names = ["as it is", *(f"{of.address} at zero" for of in mechanism.weights)]
    head = ["layer", *(f"{what}, {name}" for name in names for what in ("mass", "sinks"))]
    cells = [
        (
            str(layer),
            *(f"{x:.2f}" for m in models for x in (m.mass[layer], m.sink_heads[layer])),
        )
        for layer in range(len(mechanism.sinks.mass))
    ]
    return table(head, cells)


def _means(result: Identified, weights: Sequence[WeightMechanism]) -> Iterable[str]:
    yield "## A constant in place of the weight"
    if result.setup.n_windows < 2:
        yield "Not measured: the mean comes from other windows of the text; give --windows 2."
        return
    yield (
        "The weight is zero, and what it adds to its output channel is replaced by its mean over "
        "the other windows. `by size`: one mean for the positions where it adds at least half of "
        "the most that it adds anywhere, one for all others. `everywhere`: one mean for all. A "
        "ratio of 1 is a model as good as the intact one: then it is the constant that counts."
    )
    ratios = {c.address: c.proof.ratio for c in result.candidates}
    cells = [
        (
            str(of.address),
            number(ratios[of.address]),
            number(of.mean.ratio_everywhere),
            number(of.mean.ratio_by_size),
            f"{of.mean.mean:.3g}",
            f"{of.mean.mean_large:.3g}",
            f"{of.mean.n_large} of {of.mean.n_positions}",
        )
        for of in weights
        if of.mean
    ]
    head = ("weight", "zero", "everywhere", "by size", "mean", "mean of large ones", "large ones")
    yield table(head, cells)


def _rounding(mechanism: Mechanism) -> Iterable[str]:
    if mechanism.rounding is None:
        return
    names = "; ".join(str(of.address) for of in mechanism.weights)
    yield "## Rounded weights"
    yield (
        "Ratios of perplexity with all projections of all blocks rounded to the nearest of 2^bits "
        "steps between the smallest and the largest weight of a group: a matrix (tensor), an "
        f"output channel, or 128 neighbours in a row (block). `held out`: {names} keep their value "
        "and have no part in the steps. No outlier is clipped."
    )
    cells = [
        (f"int{r.bits}", r.group, number(r.ratio), number(r.ratio_held)) for r in mechanism.rounding
    ]
    yield table(("bits", "group", "all rounded", "held out"), cells)


def _dose_texts(mechanism: Mechanism) -> Iterable[str]:
    if mechanism.dose_texts is None:
        return
    yield "## Text at every dose"
    if not mechanism.dose_texts:
        yield "None: no prompt leaves room for an answer in the model's context."
        return
    yield (
        f"Greedy continuations with {mechanism.weights[0].address} times a factor. `same`: first "
        "tokens that the model as it is writes too. `repeats`: how many tokens there were when the "
        "last four came for the second time."
    )
    cells = [
        (
            f"{t.scale:g}",
            cell(t.prompt),
            f"{t.same_tokens} of {t.n_tokens}",
            "no" if t.repeats_after is None else str(t.repeats_after),
            cell(t.text),
        )
        for t in mechanism.dose_texts
    ]
    yield table(("factor", "prompt", "same", "repeats", "text"), cells)
