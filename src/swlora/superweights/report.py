"""An identification as Markdown: the answer first, the evidence, and all that repeats it.

Made from the result of `identify` alone.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from swlora.files import write_text
from swlora.plural import counted
from swlora.superweights.figure import draw_dose, draw_path, draw_scan, draw_sinks
from swlora.superweights.findings import Identified
from swlora.superweights.report_fine_tuned import fine_tuned_answer, fine_tuned_sections
from swlora.superweights.report_mechanism import (
    mechanism_answer,
    mechanism_sections,
    sink_lines,
)
from swlora.superweights.search import Setting
from swlora.superweights.tables import cell, interval, number, table

COLUMNS = (
    *("layer", "module", "out", "in", "weight"),
    *("ratio", "95 %", "control", "agree", "verdict"),
)
OUTCOMES = {
    "nothing massive": "no activation of the residual stream is massive",
    "suppressed": "no activation is massive any more",
    "no single weight": "a massive activation is left, but no single weight makes it",
    "rounds used up": "a massive activation is left, but the search has used up its rounds",
}


def draw_figure(result: Identified, target: Path) -> Identified:
    """Draw the scan, the figure that needs no report; return the result with its path."""
    draw_scan(result.setup.model, result.modules, result.layers, target)
    return replace(result, figure=target)


def publish(result: Identified, folder: Path, scan_figure: Path) -> Identified:
    """Draw the figures and write superweights.md into a folder; return the result with their paths.

    The scan goes to `scan_figure`, the other figures into the folder, in the same format.
    """
    suffix = scan_figure.suffix.lower()
    path_figure = folder / f"superweights-path{suffix}"
    dose_figure = folder / f"superweights-dose{suffix}"
    drawn = draw_figure(result, scan_figure)
    draw_path(result.path, path_figure)
    draw_dose(result.dose_curve, dose_figure)
    figures = {
        "Largest activations": scan_figure,
        "Path of the super activation": path_figure,
        "Dose curve": dose_figure,
    }
    if lines := sink_lines(result):
        figures["Attention on the first position"] = folder / f"superweights-sinks{suffix}"
        draw_sinks(result.setup.model, lines, figures["Attention on the first position"])
    report = folder / "superweights.md"
    whole = replace(drawn, figures=figures, report=report)
    write_report(whole, report)
    return whole


def write_report(result: Identified, target: Path) -> None:
    """Write the report; it links the figures relative to its own folder."""
    parts = [
        f"# Super weights of {result.setup.model}",
        "\n".join(f"- {line}" for line in answer(result)),
        *_candidates(result),
        *_search(result),
        *_texts(result),
        *mechanism_sections(result),
        *fine_tuned_sections(result),
        *_figures(result, target),
        *_repeat(result),
    ]
    write_text(target, "\n\n".join(parts) + "\n")


def answer(result: Identified) -> list[str]:
    """Return what was found in a sentence each: single weights, all together, published ones."""
    proved = [c for c in result.candidates if c.is_proved]
    if proved:
        layers = ", ".join(map(str, result.layers))
        said = [f"layers with a verified super weight: {layers}"]
    else:
        limits = result.setup.thresholds
        said = [
            "no super weight: setting any one candidate to zero barely matters in this model"
            if max(c.proof.ratio for c in result.candidates) <= limits.strong
            else "no super weight: what the candidates do, in nats a token, is not more than "
            f"{limits.control_factor:g} times what random weights of like size do"
        ]
    removal = ", ".join(map(str, result.removal_layers))
    if removal:
        said.append(f"layers that take the super activation away again: {removal}")
    together = {f"all {counted(len(result.candidates), 'candidate')}": result.joint}
    if len(proved) > 1 and result.joint_proven:
        together[f"the {len(proved)} verified ones"] = result.joint_proven
    for who, effect in together.items():
        ratio = f"ratio {number(effect.ratio)} ({interval(*effect.interval)})"
        said.append(f"{who} zeroed together: {ratio}, {effect.verdict}")
    said += mechanism_answer(result)
    said.append(agreement(result.search.settings))
    if result.known:
        said.append(result.known.said)
    return [*said, *fine_tuned_answer(result)]


def agreement(settings: Sequence[Setting]) -> str:
    """Say how far prompts, with and without BOS, agree on the super activation."""
    massive = [s for s in settings if s.is_massive]
    n_prompts = len({s.prompt for s in settings})
    tried = counted(n_prompts, "prompt") + (
        ", with and without BOS" if len({s.has_bos for s in settings}) > 1 else ""
    )
    if not massive:
        return f"no massive activation in {tried}"
    places = {s.activation.channel for s in massive}
    where = ", ".join(f"channel {channel}" for channel in sorted(places))
    of_all = f"{len(massive)} of {counted(len(settings), 'setting')}"
    return f"massive activation in {of_all} ({tried}), at {where}"


def rows(result: Identified) -> list[tuple[str, ...]]:
    """Return the cells of every candidate under `COLUMNS`."""
    n_settings = len(result.search.settings)
    return [
        (
            str(c.address.layer),
            c.address.module,
            str(c.address.out_channel),
            str(c.address.in_channel),
            f"{c.seen.weight:.3f}",
            number(c.proof.ratio),
            interval(*c.proof.interval),
            "-" if c.proof.largest_control is None else number(c.proof.largest_control),
            f"{round(c.agreement * n_settings)}/{n_settings}",
            c.proof.verdict,
        )
        for c in result.candidates
    ]


def _candidates(result: Identified) -> Iterable[str]:
    setup, limits = result.setup, result.setup.thresholds
    yield "## Candidates"
    yield table(COLUMNS, rows(result))
    yield (
        f"Perplexity of the intact model: {result.perplexity:.3f}. `ratio` is the perplexity "
        "with the weight at zero over that, `95 %` its bootstrap interval, `control` the ratio of "
        f"the one that matters most of {setup.n_controls} random weights of the same matrix and of "
        f"like size (where the ratio exceeds {limits.strong:g}, on the first "
        f"{result.control_windows} of {counted(setup.n_windows, 'window')}), `agree` in how many "
        "settings the candidate was seen. In nats a token, on the same windows, a verified "
        f"candidate's effect is more than {limits.control_factor:g} times that of any control: "
        f"`super` above a ratio of {limits.super:g}, `strong` above {limits.strong:g}."
    )
    yield table(
        ("candidate", "all but this one zeroed"),
        [(str(c.address), number(c.proof.leave_one_out_ratio)) for c in result.candidates],
    )


def _search(result: Identified) -> Iterable[str]:
    found = result.search
    zeroed = "; ".join(str(round.address) for round in found.rounds) or "nothing"
    yield "## Search"
    yield (
        f"Zeroed one after the other: {zeroed}. Then {OUTCOMES[found.outcome]}. "
        f"An activation is massive at {result.setup.thresholds.massive_ratio:g} times the median "
        "magnitude of its state."
    )
    cells = [
        (
            cell(s.prompt),
            "yes" if s.has_bos else "no",
            *map(str, (s.activation.layer, s.activation.token, s.activation.channel)),
            f"{s.activation.value:.1f}",
            f"{s.activation.ratio:.0f}",
            ", ".join(map(str, s.removal_layers)) or "-",
        )
        for s in found.settings
    ]
    head = ("prompt", "BOS", "layer", "token", "channel", "value", "times median", "removed in")
    yield table(head, cells)


def _texts(result: Identified) -> Iterable[str]:
    written = result.generations
    yield "## Text before and after"
    yield f"Greedy continuations, as the model is and with {written.name} set to zero."
    if not written.texts:
        yield "None: no prompt leaves room for an answer in the model's context."
        return
    cells = [tuple(map(cell, (t.prompt, t.before, t.after))) for t in written.texts]
    yield table(("prompt", "as it is", "set to zero"), cells)


def _figures(result: Identified, target: Path) -> Iterable[str]:
    yield "## Figures"
    for title, path in (result.figures or {}).items():
        yield f"![{title}](<{Path(os.path.relpath(path, target.parent)).as_posix()}>)"


def _repeat(result: Identified) -> Iterable[str]:
    setup, bootstrap = result.setup, result.bootstrap
    yield "## To repeat this"
    facts = {
        "model": f"{setup.model}, revision {setup.model_revision or 'not named'}",
        "arithmetic": f"{setup.dtype} on {setup.device}",
        "text": (
            f"{setup.text}: {counted(setup.n_windows, 'window')} of {setup.window_tokens} tokens, "
            f"{'each beginning with' if setup.windows_begin_with_bos else 'without'} BOS, as "
            f"the tokenizer has it; sha256 of the token ids {setup.text_tokens_sha256}"
        ),
        "prompts": "; ".join(map(cell, setup.prompts)),
        "seed": setup.seed,
        "controls": f"{setup.n_controls} a candidate",
        "bootstrap": f"{bootstrap.draws} draws of blocks of {bootstrap.block_tokens} tokens",
        "thresholds": ", ".join(f"{k} {v:g}" for k, v in vars(setup.thresholds).items()),
        "packages": ", ".join(f"{k} {v}" for k, v in setup.packages.items()),
    }
    yield table(("what", "value"), [(what, str(value)) for what, value in facts.items()])
