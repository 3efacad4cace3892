"""What shares a step, held against the loss: every `--order` with the same number of tree nodes.

    python -m benchmarks.orders --json F [--data e2e] [--orders prompts,pairs] [--seeds 0,1]

Each trains the embedded model once, in steps of 32 rows from the whole of E2E's training file,
until `--nodes` tree nodes have run, and ends with the loss on all rows of the first 60 dev prompts;
with `--data chats` each row is a chat of two references, the second asked for in other words,
behind a system turn. Nodes are what a step costs; the CPU seconds beside them are those of the
steps.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks import runner
from benchmarks.recipes.descent import Descent
from benchmarks.recipes.rows import DEV_PROMPTS
from benchmarks.rows import find_e2e, load
from swlora.adapters.methods import adapt, train_mode
from swlora.config import AdapterSpec, ModelSpec, TrainSpec
from swlora.data.dataset import group_references
from swlora.data.encode import encode_examples
from swlora.data.examples import Example, Message
from swlora.data.prefix_tree import build_tree
from swlora.data.steps import StepOrder
from swlora.data.token_sequences import TokenSequences
from swlora.evaluation.loss import dataset_loss
from swlora.models.anatomy import Anatomy
from swlora.models.load import load_model
from swlora.progress import Silent
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep

SYSTEM = Message("system", "Describe the restaurant in a sentence or two, by these facts alone.")
AGAIN = Message("user", "Say it in other words.")


def main() -> None:
    orders = ",".join(get_args(StepOrder))
    parser = argparse.ArgumentParser(description="The loss that each order of rows reaches.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    parser.add_argument("--data", choices=["e2e", "chats"], default="e2e")
    parser.add_argument("--orders", default=orders, help=f"of {orders}")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--nodes", type=int, default=24_000, help="tree nodes that each one runs")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    args = parser.parse_args()

    from swlora.files import write_json

    bench, results = Bench(find_e2e(args.e2e), as_chats=args.data == "chats"), []
    for seed in map(int, args.seeds.split(",")):
        for order in args.orders.split(","):
            results.append(bench.run(order, seed, args.nodes, args.rate))
            print(args.data, *(f"{k}={v}" for k, v in results[-1].items()), flush=True)
    machine = {"machine": runner.machine(), "dev_prompts": DEV_PROMPTS, "rate": args.rate}
    write_json(args.json, {"benchmark": "orders", "data": args.data, **machine, "runs": results})


class Bench:
    """The model and the data, loaded once."""

    def __init__(self, e2e: Path, *, as_chats: bool) -> None:
        self._loaded = load_model(ModelSpec(name=runner.builtin_model()))
        dataset = load(e2e)
        dev = [
            Example(e.prompt, text)
            for e, texts in group_references(dataset.dev)[:DEV_PROMPTS]
            for text in texts
        ]
        rows = [in_chats(split) if as_chats else split for split in (dataset.train, dev)]
        self._train, self._dev = (
            encode_examples(
                split,
                dataset.separator,
                self._loaded.tokenizer,
                context_tokens=self._loaded.context_tokens,
                truncate=False,
            ).sequences
            for split in rows
        )

    def run(self, order: StepOrder, seed: int, n_nodes: int, rate: float) -> dict[str, Any]:
        """Train in an order for so many nodes; return what it took and the loss on the dev rows."""
        spec = TrainSpec(batch_size=32, learning_rate=rate, order=order)
        steps = Schedule.of(self._train, spec, seed).epoch(0)
        few = steps[: n_nodes // 100]
        n_so_far = list(accumulate(count_nodes(self._train, step) for step in few))
        n_steps = min(range(len(n_so_far)), key=lambda i: abs(n_so_far[i] - n_nodes)) + 1
        spec = spec.model_copy(update={"max_steps": n_steps})
        n_layers = Anatomy(self._loaded.model).n_layers
        adapted = adapt(self._loaded.model, AdapterSpec(), range(n_layers), seed=seed)
        start_s = time.process_time()
        schedule = Schedule.of(self._train, spec, seed)
        optimizer = torch.optim.AdamW(adapted.parameters.values(), weight_decay=0.0, fused=True)
        descent = Descent(TreeStep(adapted.model, self._train), adapted, optimizer)
        train_mode(adapted.model)
        n_rows = 0
        for number, rows in enumerate(schedule.steps()):
            descent.step(rows, schedule.learning_rate(number))
            n_rows += sum(map(len, rows))
        cpu_s = time.process_time() - start_s
        loss = dataset_loss(adapted.model.eval(), self._dev, Silent())
        adapted.model.unload()
        found = {"order": order, "seed": seed, "steps": n_steps, "rows": n_rows}
        nodes = {"nodes": n_so_far[n_steps - 1], "cpu_s": round(cpu_s, 1)}
        return found | nodes | {"nll": round(loss.nats_per_token, 4)}


def in_chats(examples: Sequence[Example]) -> list[Example]:
    """Return chats of two references of a prompt each; a prompt with one has none."""
    return [
        Example.chat(
            [
                SYSTEM,
                Message("user", example.prompt),
                Message("assistant", first),
                AGAIN,
                Message("assistant", second),
            ]
        )
        for example, texts in group_references(examples)
        for first, second in zip(texts[::2], texts[1::2], strict=False)
    ]


def count_nodes(sequences: TokenSequences, step: Sequence[Any]) -> int:
    """Count the tree nodes of a step."""
    return sum(len(build_tree(sequences, group).token_ids) for group in step)


if __name__ == "__main__":
    main()
