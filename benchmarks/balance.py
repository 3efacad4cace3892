"""How evenly steps are dealt to processes: the nodes of the busiest one against their mean.

python -m benchmarks.balance --json F [--ranks 8] [--batch-sizes 512,64] [--e2e FOLDER]

One epoch of E2E as it is, and of chats made of it: a system turn, the facts, an answer, the wish
for other words, another answer. Nothing is trained. Of the steps of a case:

    busiest   nodes of the busiest process, summed over the steps : the same of the mean process
    worst     the largest ratio of a single step
    repeated  nodes of all processes : nodes of a single one, which runs no prefix twice
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks import runner
from benchmarks.rows import find_e2e
from swlora.data.dealing import deal
from swlora.data.prefix_tree import count_group_nodes
from swlora.data.steps import cut_group, plan_steps
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.files import write_json

SYSTEM = "Describe the restaurant in a sentence or two, by these facts alone.\n"
TREE_TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description="Load balance of dealt steps.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch-sizes", default="512,64", help="examples a step, comma-separated")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(f"{runner.builtin_model()}/tokenizer.json")
    with (find_e2e(args.e2e) / "trainset.csv").open(encoding="utf-8") as file:
        rows = [(mr, text) for mr, text, *_ in list(csv.reader(file))[1:]]
    cases = [
        case(kind, sequences, order, int(size), args.ranks)
        for kind, sequences in data(rows, tokenizer)
        for size in args.batch_sizes.split(",")
        for order in ("prompts", "neighbours", "iid")
    ]
    write_json(args.json, {"benchmark": "balance", "ranks": args.ranks, "cases": cases})
    names = ("data", "order", "batch_size", "steps", "busiest", "worst", "repeated")
    shown = [
        [f"{c[n]:.3f}" if isinstance(c[n], float) else str(c[n]) for n in names] for c in cases
    ]
    print(runner.table(names, shown))


def data(rows: list[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[str, TokenSequences]]:
    """Yield (name, sequences)."""
    turns = [(f"{SYSTEM}user: {mr}\n", text) for mr, text in rows]
    chats = [
        (prompt, f"{text}\nuser: Say it in other words.\n{again}")
        for (prompt, text), (_, again) in zip(turns, rows[1:] + rows[:1], strict=True)
    ]
    for name, pairs in (("E2E", [(f"{mr}\n", text) for mr, text in rows]), ("chats", chats)):
        sides = [tokenizer.encode_batch([pair[k] for pair in pairs]) for k in (0, 1)]
        yield (
            name,
            TokenSequences.from_lists([(a.ids, b.ids) for a, b in zip(*sides, strict=True)]),
        )


def case(
    kind: str, sequences: TokenSequences, order: Any, batch_size: int, n_ranks: int
) -> dict[str, Any]:
    """Deal all steps of an epoch."""

    def cut(ids: Ints) -> list[Ints]:
        return cut_group(sequences, ids, TREE_TOKENS)

    steps = plan_steps(
        sequences,
        sequences_per_step=batch_size,
        max_tokens_per_tree=TREE_TOKENS,
        order=order,
        seed=1,
        epoch=0,
    )
    nodes = np.array([[s.n_nodes for s in deal(sequences, step, n_ranks, cut)] for step in steps])
    alone = sum(int(count_group_nodes(sequences, step).sum()) for step in steps)
    busiest, mean = nodes.max(axis=1), nodes.mean(axis=1)
    return {
        "data": kind,
        "order": order,
        "batch_size": batch_size,
        "steps": len(nodes),
        "busiest": float(busiest.sum() / mean.sum()),
        "worst": float((busiest / mean).max()),
        "repeated": float(nodes.sum() / alone),
    }


if __name__ == "__main__":
    main()
