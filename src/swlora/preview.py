"""What will be trained, seen before anything is: the rows as the model sees them, and their sums.

Neither needs the weights of the model, so `preview_data` loads its tokenizer and configuration.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from swlora.config import DataSpec, RunSpec
from swlora.data.summary import DataSummary, SplitSummary, summarise_split, summarise_steps
from swlora.data.token_sequences import TokenSequences
from swlora.job import Job
from swlora.progress import Progress
from swlora.result_json import FLAT, NO_KEY
from swlora.run_record import MemoryRecord

if TYPE_CHECKING:
    from swlora.training.schedule import Schedule

MAX_SEQUENCES = 4  # shown of a row
SAMPLED_SEQUENCES = 10_000


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a sequence as text; `weight` is how much each is trained."""

    text: str
    weight: float
    is_special: bool


@dataclass(frozen=True)
class ShownSequence:
    """A sequence as the model sees it."""

    n_tokens: int
    n_trained_tokens: int
    spans: list[Span]


@dataclass(frozen=True)
class ShownRow:
    """A row: where it stands, how many sequences it became, and the first of them."""

    place: str
    n_sequences: int
    sequences: list[ShownSequence]


@dataclass(frozen=True)
class DataPreview:
    """What `swlora data` found: where it comes from, its sums, and some rows.

    `refused` says why a training with these settings would not begin.
    """

    model: str
    data: str
    summary: DataSummary = field(metadata=FLAT)
    refused: list[str]
    shown: list[ShownRow]
    trained_p99_tokens: int = field(default=0, metadata=NO_KEY)


def preview_data(spec: RunSpec, n_rows: int, progress: Progress) -> DataPreview:
    """Encode the data of `spec` as a training would, and show the first `n_rows` training rows.

    Bad and over-long rows are counted whatever the settings say. Raises what a training raises for
    data and tokenizer otherwise.
    """
    return preview_of(lenient_job(spec, progress), spec, n_rows)


def lenient_job(spec: RunSpec, progress: Progress) -> Job:
    """Return a job on the data of `spec` that leaves out bad rows and cuts long ones, whatever the
    settings say; of its model there are no weights.
    """
    lenient = spec.data.model_copy(update={"skip_bad_rows": True, "truncate": True})
    job = Job(spec.model_copy(update={"data": lenient}), MemoryRecord(), progress)
    _ = job.dataset
    job.load_skeleton()
    return job


def preview_of(job: Job, spec: RunSpec, n_rows: int) -> DataPreview:
    """Do what `preview_data` does with the `lenient_job` of `spec`."""
    from swlora.training.schedule import Schedule

    dataset, sequences = job.dataset, job.encoded("train").sequences
    schedule = Schedule.of(sequences, spec.train, spec.seed)
    split = spec.data.eval_split
    if not dataset.has(split):
        job.progress.say(f"the data set has no {split} split")
    summary = summarise(job, schedule, held_out=split if dataset.has(split) else None)
    first_rows = np.unique(job.encoded("train").example_ids)[:n_rows].tolist()
    shown = [_shown_row(job, row) for row in first_rows]
    p99 = _trained_tokens(sequences, 0.99)
    refused = _refusals(spec.data, summary)
    return DataPreview(job.loaded.source, dataset.source, summary, refused, shown, p99)


def _trained_tokens(sequences: TokenSequences, share: float) -> int:
    """Return so many trained tokens that a share of the first sequences have no more."""
    n = min(len(sequences), SAMPLED_SEQUENCES)
    offsets = sequences.offsets[: n + 1]
    is_trained = sequences.weights[: offsets[-1]] > 0
    return int(np.quantile(np.add.reduceat(is_trained, offsets[:-1], dtype=np.int64), share))


def summarise(job: Job, schedule: "Schedule", held_out: str | None = None) -> DataSummary:
    """Summarise the training rows of a job, its steps and, if one is named, the held-out split."""
    counts = job.dataset.counts
    splits = ["train", held_out] if held_out else ["train"]
    train, *others = (_summarise_split(job, split) for split in splits)
    bad = sum((Counter(job.encoded(split).bad) for split in splits), Counter(counts.bad))
    sequences = job.encoded("train").sequences
    return DataSummary(
        train=train,
        held_out=others[0] if others else None,
        steps=summarise_steps(sequences, schedule.epoch(0)) if _runs_trees(job) else None,
        n_duplicates=counts.n_duplicates,
        n_leaked=counts.n_leaked,
        bad_rows=dict(bad.most_common()),
    )


def _summarise_split(job: Job, split: str) -> SplitSummary:
    examples, context_tokens = job.dataset.split(split), job.loaded.context_tokens
    return summarise_split(split, job.encoded(split), examples, context_tokens)


def _runs_trees(job: Job) -> bool:
    """Say whether the steps of a training run prefix trees (see `training.step.make_step`)."""
    from swlora.models.anatomy import family_of

    family = family_of(job.loaded.model.config.model_type)
    return job.spec.train.engine != "plain" and family.has_attention_interface


def _refusals(asked: DataSpec, summary: DataSummary) -> list[str]:
    """Say which flags a training needs for the rows that it would refuse."""
    splits = [split for split in (summary.train, summary.held_out) if split]
    n_cut, n_bad = sum(split.n_cut for split in splits), sum(summary.bad_rows.values())
    refused = []
    if n_bad and not asked.skip_bad_rows:
        refused.append(f"bad rows ({n_bad:,}): --skip-bad-rows leaves them out")
    if n_cut and not asked.truncate:
        refused.append(f"rows longer than the context ({n_cut:,}): --truncate cuts them")
    return refused


# Rows


def _shown_row(job: Job, row: int) -> ShownRow:
    """Return training row `row` with its first sequences; a long document may have hundreds."""
    encoded = job.encoded("train")
    begin, end = np.searchsorted(encoded.example_ids, (row, row + 1)).tolist()
    return ShownRow(
        place=job.dataset.train[row].place_or_row(row),
        n_sequences=end - begin,
        sequences=[
            _shown_sequence(encoded.sequences, i, job.loaded.tokenizer)
            for i in range(begin, min(end, begin + MAX_SEQUENCES))
        ],
    )


def _shown_sequence(sequences: TokenSequences, i: int, tokenizer: Any) -> ShownSequence:
    begin, end = sequences.offsets[i : i + 2]
    ids = sequences.tokens[begin:end].tolist()
    weights = sequences.weights[begin:end].astype(float).tolist()
    n_trained_tokens = sum(weight > 0 for weight in weights)
    shown = spans(ids, weights, tokenizer, special_ids(tokenizer))
    return ShownSequence(len(ids), n_trained_tokens, shown)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that a tokenizer calls special."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def spans(
    ids: list[int], weights: list[float], tokenizer: Any, special: frozenset[int]
) -> list[Span]:
    """Return a sequence as text, special tokens by their names.

    A character whose tokens differ in weight stands where its last one does.
    """
    from swlora.evaluation.text_stream import Detokeniser

    detokeniser = Detokeniser(tokenizer, skips_special=False)
    pieces = [
        (detokeniser.add(token), weight, token in special)
        for token, weight in zip(ids, weights, strict=True)
    ]
    if rest := detokeniser.finish():
        pieces.append((rest, weights[-1], False))
    return [
        Span("".join(text for text, *_ in own), weight, is_special)
        for (weight, is_special), own in groupby(pieces, key=lambda piece: piece[1:])
    ]
