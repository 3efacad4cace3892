"""The results of a study as a report in Markdown: what was compared, tables, how to read them."""

from collections.abc import Sequence
from typing import Any

from swlora.evaluation.scales import OF_100
from swlora.plural import counted
from swlora.study import tables
from swlora.study.compared import Compared, FinishedArm
from swlora.study.plan import rate_beyond
from swlora.study.spec import MOST_FURTHER
from swlora.study.tables import markdown_table


def markdown_report(results: Compared) -> str:
    """Return the whole report."""
    finished = results.finished
    parts = [f"# Comparison {results.study or ''}".rstrip(), _introduction(results, finished)]
    if finished:
        parts += [
            "![total time against quality](pareto.svg)",
            _PARETO_CAPTION,
            "## Quality, and what it says against the baseline",
            markdown_table(tables.verdict_columns(["bleu", "nll"]), finished),
            "## Time",
            markdown_table(tables.time_columns(), finished),
            "![loss against seconds](curves.svg)",
            _CURVES_CAPTION,
            "## All scores",
            markdown_table(tables.score_columns(), finished),
            "Spread over seeds, smallest to largest:",
            markdown_table(
                tables.spread_columns(), [arm for arm in finished if len(arm.seeds) > 1]
            ),
            "## What was trained",
            markdown_table(tables.arm_columns(), finished),
        ]
        parts += [
            f"{arm.name} found the layers of {arm.same_as}: the runs are the same, and what "
            "finding the layers cost is in its seconds."
            for arm in finished
            if arm.same_as
        ]
    chosen = [arm for arm in results.arms if arm.rate_choice and arm.rate_choice.nll]
    if chosen:
        parts += [
            "## Choice of the learning rates",
            _rates_line(results),
            tables.rate_table(chosen),
        ]
        untried = [(arm.name, arm.rate_choice.untried) for arm in chosen if arm.rate_choice]
        parts += [f"{name}: {reason}" for name, reason in untried if reason]
    beam = [arm.beam for arm in finished if arm.beam]
    if beam:
        parts += ["## Beam search", _decode_line(beam[0].decode)]
        parts.append(markdown_table(tables.beam_columns(), beam))
    if results.unfinished:
        parts += [
            "## Without a result",
            markdown_table(tables.UNFINISHED_COLUMNS, results.unfinished),
        ]
    parts += [
        "## Beside the original",
        _ORIGINAL,
        markdown_table(tables.PUBLISHED_COLUMNS, results.published),
    ]
    parts += ["## How to read this", _explanation(results)]
    return "\n\n".join(parts) + "\n"


def _introduction(results: Compared, finished: Sequence[FinishedArm]) -> str:
    setting, facts = results.setting, results.setting["facts"]
    machine, train = facts.get("machine", {}), setting["train"]
    data = facts.get("data_source", setting["data"]["name"])
    n_rows, n_arms = facts.get("n_rows", {}).get("train"), len(results.arms)
    arms = f"{counted(n_arms, 'arm')} {'has' if n_arms == 1 else 'have'}"
    lines = [
        f"Model {setting['model']['name']}, data {data}"
        + (f", {counted(n_rows, 'training row')}" if n_rows else "")
        + f", {setting['data']['eval_split']} set"
        + (f", {counted(finished[0].n_prompts, 'prompt')}" if finished else "")
        + f"; {counted(train['epochs'], 'epoch')} unless said, "
        f"{counted(train['batch_size'], 'row')} a step. {machine.get('cpu', 'Unknown processor')}, "
        f"{machine.get('cores', '?')} cores. {len(finished)} of {arms} results; the study is "
        f"{results.status}."
    ]
    if phases_s := facts.get("phases_s"):
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in phases_s.items())
        lines.append(f"What the study itself took, by phase: {spent}.")
    if not results.controls:
        lines.append(
            "**Without controls**: they were switched off. Nothing here shows that layers with "
            "super weights do better or worse than other layers of the same number."
        )
    if finished and results.baseline not in [arm.name for arm in finished]:
        lines.append(f"The baseline {results.baseline} has no result: nothing is compared.")
    return "\n\n".join(lines)


def _rates_line(results: Compared) -> str:
    """Say how the rates were chosen, and what can be done about a choice at an edge."""
    choices = [arm.rate_choice for arm in results.arms if arm.rate_choice]
    said, extend = [_RATES], results.setting["rate"].get("extend", 0)
    if any(choice.at_edge for choice in choices):
        said.append("A choice at the edge of its grid may not be the best.")
    can_go_on = any(
        choice.chosen is not None and not choice.untried and rate_beyond(choice.grid, choice.chosen)
        for choice in choices
    )
    if can_go_on and extend < MOST_FURTHER:
        above = f" with N above {extend}" if extend else ""
        said.append(
            f"`rate: {{extend: N}}`{above} in the study file tries on beyond it; a changed file "
            "needs another --output."
        )
    return " ".join(said)


def _decode_line(decode: dict[str, Any]) -> str:
    return (
        f"{decode['num_beams']} beams, length penalty {decode['length_penalty']:g}, no repeated "
        f"{decode['no_repeat_ngram_size']}-grams."
    )


_PARETO_CAPTION = (
    "Vertical bars: 95 % interval of the paired difference from the baseline, put on the "
    "baseline's value. Where a bar stays above the lower edge of the band (the margin), the arm is "
    "non-inferior. Horizontal bars: fastest to slowest seed."
)
_CURVES_CAPTION = (
    "Mean over seeds of the loss on held-out rows; thin lines without points are smoothed training "
    "losses, of arms whose held-out loss was not measured. Dotted: what the baseline ends with."
)
_RATES = (
    "Held-out NLL after the short runs of each arm, all with one seed that is used nowhere else; "
    "the rate with the lowest was taken."
)
_ORIGINAL = (
    "The table that was published before: GPT-2, E2E, one run an arm, no controls, no intervals. "
    'It names neither the metric of its quality nor how "faster" is counted, so it cannot be put '
    "on one scale with the tables above."
)


_SCORED_TOO = (
    " Those rows are among the ones that are scored here, which flatters arms that had several "
    "rates to choose from."
)


def _chose_on_scored_rows(results: Compared) -> bool:
    """Whether rates were chosen on rows of dev that the scores are of as well."""
    data = results.setting["data"]
    has_chosen = any(arm.rate_choice is not None for arm in results.arms)
    return has_chosen and (data["eval_split"] == "dev" or data.get("eval_file") is not None)


def _explanation(results: Compared) -> str:
    margin, draws = results.margin, results.bootstrap.draws
    baseline = results.baseline
    return "\n".join(
        [
            f"- Every number of an arm is the mean over its seeds. {OF_100}; NLL is in nats a "
            "completion token, of all references, the end of the text included.",
            f"- Intervals hold the middle 95 % of {draws} bootstrap draws. A draw takes prompts "
            "(MRs) with replacement, the same for every arm, and moves the mean over an arm's "
            "seeds by as many of its standard errors as Student's distribution draws for so few "
            "seeds; differences are paired in both, by the seeds that both arms have. With one "
            "seed there is an interval for the choice of prompts only: how far another seed would "
            "move it is not in there.",
            f"- A verdict compares with {baseline} by a margin set before: {margin['bleu']:g} "
            f"BLEU, {margin['nll']:g} NLL. Non-inferior: the whole interval of the difference is "
            "better than the margin allows. Inferior: all of it is worse. Undecided: neither.",
            "- Examples are rows of the data set; their rate leaves out the first 5 % of the "
            "steps. Seconds to the end are what training this arm alone takes: steps, caches, "
            "checkpoints, finding its layers; not loading, tokenising and evaluation, which are "
            "the same for all.",
            f"- Speed-up is (rate / rate of {baseline} − 1), time saved is (1 − seconds / seconds "
            f"of {baseline}); both positive where an arm is faster. Seconds to the baseline's NLL: "
            f"when the loss on held-out rows first is what {baseline} ends with, on the mean curve "
            "of the seeds, one-off costs included. Every arm's rate decays to the end of its own "
            "schedule, so a shorter schedule might get there sooner.",
            "- English perplexity is that of English text that ships with swlora, before training "
            "and with the adapter on: what it gained was forgotten.",
            "- Learning rates were chosen for each arm on held-out rows with a seed that no run "
            "here has; what that cost is shown apart and is in no total."
            + (_SCORED_TOO if _chose_on_scored_rows(results) else ""),
        ]
    )
