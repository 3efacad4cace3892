"""What an evaluation says: scores as a table."""

from collections.abc import Mapping, Sequence

from swlora.evaluation.bootstrap import CONFIDENCE, FEW_PROMPTS, N_DRAWS
from swlora.evaluation.evaluated import EnglishLoss, Evaluated
from swlora.evaluation.scales import OF_100, OF_100_ANY_TEXT, SCALES, TEXT_SCALES
from swlora.evaluation.scores import Scores
from swlora.evaluation.text_scores import TextScores
from swlora.plural import counted


def evaluation_table(e: Evaluated) -> str:
    """Return the scores and losses of an evaluation as aligned text; see `scores_table`."""
    return scores_table(
        e.scores,
        e.intervals,
        e.n_prompts,
        has_official=e.has_official is not False,  # older results do not say
        texts=e.text_scores,
        nll=e.nll,
        nll_per_row=e.nll_per_row,
        own=e.own,
        english=e.english,
    )


def scores_table(
    scores: Scores | None,
    intervals: Mapping[str, Sequence[float]],
    n_prompts: int,
    *,
    has_official: bool = True,
    texts: TextScores | None = None,
    nll: float | None = None,
    nll_per_row: float | None = None,
    own: Mapping[str, float] | None = None,
    english: EnglishLoss | None = None,
) -> str:
    """Return scores as aligned text, with the intervals that there are.

    A score that could not be computed is n/a; few prompts are warned of. `nll` in nats a token is
    None for outputs of no model, `scores` and `texts` where there are no texts. Of the official
    five ROUGE-L alone is shown where they are not for such data.
    """
    known = {**intervals, **(texts.text_intervals if texts else {})}
    width = max([9, *map(len, own or {})])
    lines = [f"{'score':<{width}} {'value':>8}  {CONFIDENCE:.0%} interval"] if known else []
    values = scores.by_name() if scores else {}
    if not has_official:
        values = {name: value for name, value in values.items() if name == "ROUGE_L"}
    values |= {} if nll is None else {"NLL": nll}
    values |= {name: getattr(texts, name) for name in TEXT_SCALES} if texts else {}
    of_row = "" if nll_per_row is None else f", {nll_per_row:.1f} a row"
    notes = {"NLL": f"nats a trained token{of_row}"}
    if scores and scores.meteor is None:
        notes["METEOR"] = scores.meteor_reason or ""
    for name, value in values.items():
        scale = (SCALES | TEXT_SCALES)[name]
        shown = "n/a" if value is None else scale.number(value)
        bounds = scale.interval(known[name]) if name in known else ""
        note = f"({notes[name]})" if name in notes else ""
        lines.append(f"{scale.name:<{width}} {shown:>8}  {f'{bounds:<16} {note}'.strip()}".rstrip())
    lines += [f"{name:<{width}} {value:>8.4g}" for name, value in (own or {}).items()]
    if english is not None:
        now, before = f"{english.perplexity:.1f}", f"{english.perplexity_before:.1f}"
        lines.append(f"{'PPL':<{width}} {now:>8}  of English text; {before} before training")
    if not scores and not texts:
        return "\n".join([*lines, "documents have no prompts: no texts were generated"])
    of_100 = OF_100 if has_official else OF_100_ANY_TEXT
    return "\n".join([*lines, *_remarks(n_prompts, of_100, has_intervals=bool(known))])


def _remarks(n: int, of_100: str, *, has_intervals: bool) -> list[str]:
    """Say what the numbers of `n` prompts mean, and where they mean little."""
    drawn = f"; intervals from {N_DRAWS:,} draws of the {n} prompts" if has_intervals else ""
    said = [of_100 + drawn]
    if n < FEW_PROMPTS:
        too_narrow = ", and intervals from so few are too narrow" if has_intervals else ""
        said.append(
            f"only {counted(n, 'prompt')}: the scores say little of other prompts{too_narrow}; "
            f"evaluate on {FEW_PROMPTS} or more"
        )
    return said
