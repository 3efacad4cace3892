"""A model without and with an adapter, side by side, as sentences and tables of Markdown."""

from collections.abc import Iterator

from swlora.superweights.findings import FineTuned, Identified
from swlora.superweights.search import Activation
from swlora.superweights.tables import cell, number, table


def fine_tuned_answer(result: Identified) -> Iterator[str]:
    """Say in a sentence each what the adapter changes of super weights and super activation."""
    if (tuned := result.fine_tuned) is None:
        return
    layers = ", ".join(map(str, tuned.after.layers)) or "none"
    yield f"with the adapter in {tuned.adapter}: layers with a verified super weight: {layers}"
    for moved in tuned.weights:
        yield (
            f"with the adapter, {moved.address} goes from {moved.weight_before:.3f} to "
            f"{moved.weight_after:.3f}, its ratio from {number(moved.ratio_before)} to "
            f"{number(moved.ratio_after)}"
        )


def fine_tuned_sections(result: Identified) -> Iterator[str]:
    """Return the part of the report about the model with an adapter."""
    if (tuned := result.fine_tuned) is None:
        return
    yield "## Before and after fine-tuning"
    yield (
        f"The same search and proof with the adapter in {cell(tuned.adapter)} added to the "
        f"weights. Perplexity of the text: {result.perplexity:.3f} before, "
        f"{tuned.after.perplexity:.3f} after; ratios are over that of their own model."
    )
    yield from _weights(tuned)
    yield table(
        ("prompt", "BOS", "layer, token, channel before", "after", "value before", "after"),
        [
            (
                cell(m.prompt),
                "yes" if m.has_bos else "no",
                *(_place(a) for a in (m.before, m.after)),
                *(f"{a.value:.1f} ({a.ratio:.0f} x median)" for a in (m.before, m.after)),
            )
            for m in tuned.activations
        ],
    )
    yield table(
        ("layer", "attention on the first position before", "after"),
        [
            (str(layer), *(f"{mass:.2f}" for mass in masses))
            for layer, masses in enumerate(
                zip(tuned.sinks_before.mass, tuned.sinks_after.mass, strict=True)
            )
        ],
    )


def _weights(tuned: FineTuned) -> Iterator[str]:
    if not tuned.weights:
        yield "No weight is proved before or after."
        return
    yield table(
        ("weight", "value before", "after", "ratio before", "after", "verdict before", "after"),
        [
            (
                str(m.address),
                f"{m.weight_before:.4f}",
                f"{m.weight_after:.4f}",
                number(m.ratio_before),
                number(m.ratio_after),
                m.verdict_before or "no candidate",
                m.verdict_after or "no candidate",
            )
            for m in tuned.weights
        ],
    )


def _place(activation: Activation) -> str:
    return f"{activation.layer}, {activation.token}, {activation.channel}"
