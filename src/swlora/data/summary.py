"""What a data set comes to: rows, tokens, lengths, what they share, what was left out.

A summary is a value that goes into `result.json`; the last functions say it to a person.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from swlora.data.dataset import number_prompts
from swlora.data.encode import Encoded
from swlora.data.examples import Example
from swlora.data.prefix_tree import count_group_nodes
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.plural import counted
from swlora.result_json import IF_ANY

Fact = tuple[str, str]
MAX_REASONS = 8  # that a person reads


@dataclass(frozen=True)
class SplitSummary:
    """A split as it is encoded.

    `n_trained_tokens` have a weight above 0. The lengths are of sequences, in tokens; of the rows
    that were cut (`n_cut`) only the longest counts as it was before. `n_rows_sharing` rows have a
    prompt that another one has too.
    """

    split: str
    n_rows: int
    n_sequences: int
    n_tokens: int
    n_trained_tokens: int
    trained_share: float
    median_tokens: int
    p95_tokens: int
    longest_tokens: int
    context_tokens: int
    n_cut: int
    n_prompts: int
    n_rows_sharing: int


@dataclass(frozen=True)
class StepSummary:
    """The steps of the first epoch, by their means, and what their prefix trees save.

    `n_nodes` are those of all trees; `ideal_ratio` is the tokens of all sequences, which a training
    without trees and without padding runs, by the nodes.
    """

    n_steps: int
    sequences_per_step: float
    n_nodes: int
    nodes_per_step: float
    ideal_ratio: float


@dataclass(frozen=True)
class DataSummary:
    """What is trained on and, where it was encoded, what is evaluated on.

    `steps` is None where no trees are run. `n_duplicates` and `n_leaked` are those of
    `dataset.Counts`; `bad_rows` were left out, by the reason.
    """

    train: SplitSummary
    n_duplicates: int
    n_leaked: int
    bad_rows: Mapping[str, int]
    steps: StepSummary | None = field(default=None, metadata=IF_ANY)
    held_out: SplitSummary | None = field(default=None, metadata=IF_ANY)


def summarise_split(
    split: str, encoded: Encoded, examples: Sequence[Example], context_tokens: int
) -> SplitSummary:
    """Summarise a split; `examples` are those that `encoded` numbers."""
    sequences, used = encoded.sequences, np.unique(encoded.example_ids)
    n_tokens, n_trained = len(sequences.tokens), int(np.count_nonzero(sequences.weights))
    n_of_prompt = np.bincount(number_prompts(examples)[used])
    median, p95 = np.quantile(sequences.lengths, (0.5, 0.95), method="inverted_cdf").tolist()
    return SplitSummary(
        split=split,
        n_rows=len(used),
        n_sequences=len(sequences),
        n_tokens=n_tokens,
        n_trained_tokens=n_trained,
        trained_share=n_trained / n_tokens,
        median_tokens=median,
        p95_tokens=p95,
        longest_tokens=max(int(sequences.lengths.max()), encoded.longest_cut_tokens),
        context_tokens=context_tokens,
        n_cut=encoded.n_cut,
        n_prompts=int(np.count_nonzero(n_of_prompt)),
        n_rows_sharing=int(n_of_prompt[n_of_prompt > 1].sum()),
    )


def summarise_steps(sequences: TokenSequences, steps: Sequence[Sequence[Ints]]) -> StepSummary:
    """Summarise the steps of an epoch, each the sequence ids of its trees."""
    groups = [ids for step in steps for ids in step]
    n_nodes = int(count_group_nodes(sequences, groups).sum())
    return StepSummary(
        n_steps=len(steps),
        sequences_per_step=len(sequences) / len(steps),
        n_nodes=n_nodes,
        nodes_per_step=n_nodes / len(steps),
        ideal_ratio=len(sequences.tokens) / n_nodes,
    )


# For a person


def split_facts(split: SplitSummary) -> list[Fact]:
    """Return what a person reads of a split; the names are the same for each."""
    return [
        ("rows", f"{split.n_rows:,}"),
        ("sequences", f"{split.n_sequences:,}"),
        ("prompts", f"{split.n_prompts:,}; {split.n_rows_sharing:,} rows share theirs"),
        ("tokens", f"{split.n_tokens:,}, {split.trained_share:.1%} trained"),
        ("tokens a sequence", _lengths(split)),
        (f"over the context of {split.context_tokens:,}", f"{split.n_cut:,}"),
    ]


def step_facts(steps: StepSummary) -> list[Fact]:
    """Return what a person reads of the steps of an epoch."""
    return [
        ("steps an epoch", f"{steps.n_steps:,}"),
        ("sequences a step", f"{steps.sequences_per_step:,.1f}"),
        ("tree nodes a step", f"{steps.nodes_per_step:,.0f}"),
        ("tokens : tree nodes", f"{steps.ideal_ratio:.2f}, the ideal gain of the trees"),
    ]


def doubtful_facts(summary: DataSummary) -> list[Fact]:
    """Return what a person reads of rows that may be a mistake."""
    facts = [
        ("repeated rows", f"{summary.n_duplicates:,}"),
        ("rows with a prompt of dev or test", f"{summary.n_leaked:,}"),
    ]
    bad = [f"{n:,}: {reason}" for reason, n in summary.bad_rows.items()] or ["0"]
    if len(bad) > MAX_REASONS:
        n_others = sum(list(summary.bad_rows.values())[MAX_REASONS:])
        bad = [*bad[:MAX_REASONS], f"{n_others:,}: other reasons"]
    return [*facts, *(("bad rows", said) for said in bad)]


def short_lines(summary: DataSummary) -> list[str]:
    """Return the lines with which a training begins."""
    train, steps = summary.train, summary.steps
    own = "" if train.n_sequences == train.n_rows else f", {counted(train.n_sequences, 'sequence')}"
    lines = [
        f"to train on: {counted(train.n_rows, 'row')} of {counted(train.n_prompts, 'prompt')}"
        f"{own}; {counted(train.n_tokens, 'token')}, {train.trained_share:.1%} trained; tokens a "
        f"sequence: {_lengths(train)}, of a context of {train.context_tokens:,}"
    ]
    if steps:
        lines.append(
            f"steps: {steps.n_steps:,} an epoch, of {steps.sequences_per_step:,.1f} sequences and "
            f"{steps.nodes_per_step:,.0f} tree nodes; tokens : nodes = {steps.ideal_ratio:.2f}"
        )
    if n := summary.n_duplicates:
        lines.append(f"training rows that repeat an earlier one: {n:,}")
    if n := summary.n_leaked:
        lines.append(f"training rows with a prompt of dev or test: {n:,}")
    return lines


def _lengths(split: SplitSummary) -> str:
    median, p95, longest = split.median_tokens, split.p95_tokens, split.longest_tokens
    return f"{median:,} median, {p95:,} p95, {longest:,} longest"
