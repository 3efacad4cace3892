"""Work without end, and say on stdout how far it is: "seconds of the clock, units done" a line.

python -m benchmarks.busy_arm train|peft|unsloth|eval --model FOLDER --data FOLDER [--threads N]

`train`, `peft` and `unsloth` count rows that were trained on (LoRA r = 4, all layers, 32, 8 and 8
rows a step); `eval` counts prompts: the loss of each row of 32 prompts, and 32 tokens of greedy
text for each. The data of `unsloth`, which runs in an environment without swlora, is a file of
TokenRows.
"""

import argparse
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

POOL_ROWS = 640
EVAL_PROMPTS, EVAL_TOKENS = 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Work until killed.")
    parser.add_argument("name", choices=("train", "peft", "unsloth", "eval"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--threads", type=int, help="a fixed number of threads")
    parser.add_argument("--dtype", help="of Unsloth's weights: what swlora chooses here")
    args = parser.parse_args()
    if args.name == "unsloth":
        train_unsloth(args.model, args.data, args.dtype)
        return

    from benchmarks import rows
    from swlora.threads import fix_threads

    if args.threads:
        fix_threads(args.threads)
    dataset = rows.load(args.data)
    if args.name == "eval":
        evaluate(args.model, dataset)
    else:
        train(args.name, args.model, dataset)


def tell(units: int) -> None:
    """Say how much is done."""
    print(f"{time.monotonic():.3f} {units}", file=sys.__stdout__, flush=True)


def train(name: str, model: str, dataset: Any) -> None:
    """Train for ever, by our own loop or by PEFT and the Trainer."""
    from benchmarks import rows
    from benchmarks.arms import ARMS

    pool = rows.pool(dataset.train, POOL_ROWS)
    if name == "train":
        from benchmarks import ours

        class Clock(ours.StepClock):
            def advance(self, amount: float = 1.0, note: str = "") -> None:
                super().advance(amount, note)
                tell(ours_arm.batch * len(self.ticks))

        ours_arm = replace(ARMS["ours-32"], epochs=60)
        ours.run(ours_arm, model, dataset.separator, pool, Clock())
    else:
        from benchmarks import peers

        peft_arm = ARMS["peft-8"]
        clock = telling_clock(peft_arm.batch)
        peers.run(peft_arm, model, dataset.separator, pool, POOL_ROWS, clock)


def train_unsloth(model: str, tokens: Path, dtype: str) -> None:
    """Train for ever by Unsloth, on the rows of a file."""
    from benchmarks import unsloth_peer
    from benchmarks.arms import ARMS, SCENARIO_ARMS
    from benchmarks.token_rows import TokenRows

    arm = replace(SCENARIO_ARMS["unsloth"], batch=ARMS["peft-8"].batch)
    rows = TokenRows.load(tokens)
    with redirect_stdout(sys.stderr):  # it greets on stdout
        unsloth_peer.run(arm, model, rows, len(rows), dtype, lambda: telling_clock(arm.batch))


def telling_clock(batch: int) -> Any:
    """Return a Trainer's callback that says after every step how many rows are done."""
    from benchmarks.trainer_steps import TickCallback

    class Ticks(TickCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            tell(batch * len(self.ticks))

    return Ticks()


def evaluate(model: str, dataset: Any) -> None:
    """Evaluate for ever, every time the same prompts."""
    from swlora.config import DecodeSpec, ModelSpec
    from swlora.data.dataset import group_references
    from swlora.data.encode import encode_examples, encode_prompts
    from swlora.evaluation.decode import generate
    from swlora.evaluation.loss import dataset_loss
    from swlora.models.load import load_model
    from swlora.progress import Silent

    loaded = load_model(ModelSpec(name=model))
    groups = group_references(dataset.dev)[:EVAL_PROMPTS]
    prompts = encode_prompts([e for e, _ in groups], dataset.separator, loaded.tokenizer)
    chosen = {example.prompt for example, _ in groups}
    examples = [example for example in dataset.dev if example.prompt in chosen]
    limits = {"context_tokens": loaded.context_tokens, "truncate": False}
    sequences = encode_examples(examples, dataset.separator, loaded.tokenizer, **limits).sequences
    spec = DecodeSpec(max_new_tokens=EVAL_TOKENS)
    done, ends = 0, loaded.end_token_ids
    while True:
        dataset_loss(loaded.model, sequences, Silent())
        generate(loaded.model, loaded.tokenizer, prompts, spec, Silent(), end_token_ids=ends)
        done += EVAL_PROMPTS
        tell(done)


if __name__ == "__main__":
    main()
