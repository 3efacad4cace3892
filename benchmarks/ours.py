"""The arm of this package: the real step function in the real loop, nothing left out.

Time is read off the loop's own progress reports, so that a step costs all that it costs a user:
building the row, the gradient, the optimizer, the metrics line. The first pass over the rows fills
the cache of states below the lowest adapted layer, the second reads it.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import flat, measure
from benchmarks.arms import LEARNING_RATE, LORA_ALPHA, LORA_RANK, Arm
from swlora.config import AdapterSpec, ModelSpec, RunSpec, TrainSpec
from swlora.data.encode import encode_examples
from swlora.data.examples import Example
from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.memory import kept_for_steps, steps_limit_bytes
from swlora.metrics_file import read_metrics
from swlora.models.anatomy import Anatomy
from swlora.models.load import LoadedModel, load_model
from swlora.progress import Silent
from swlora.runs import Run
from swlora.training import step as training_step
from swlora.training.necessary_work import necessary_flops


class StepClock(Silent):
    """Notes when the loop began and when each step ended, and what was said."""

    def __init__(self) -> None:
        self.ticks: list[float] = []
        self.lines: list[str] = []

    def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002
        self.ticks.append(time.perf_counter())

    def say(self, message: str) -> None:
        self.lines.append(message)


def run(
    arm: Arm,
    model_folder: str,
    separator: str,
    rows: list[Example],
    clock: StepClock | None = None,
) -> dict[str, Any]:
    """Train an adapter on `rows` for the arm's epochs; return what was measured."""
    return run_sequences(arm, model_folder, lambda loaded: encode(rows, separator, loaded), clock)


def run_sequences(
    arm: Arm,
    model_folder: str,
    sequences_of: Callable[[LoadedModel], TokenSequences],
    clock: StepClock | None = None,
) -> dict[str, Any]:
    """Train an adapter on the sequences that `sequences_of` makes; return what was measured."""
    from swlora.adapters.methods import adapt, train_mode
    from swlora.training.fitting import copies_worth_bytes, fit_into_memory
    from swlora.training.schedule import Schedule, step_plan
    from swlora.training.step import make_step

    watch, clock = measure.Stopwatch(), clock or StepClock()
    with watch("load_model"):
        loaded = load_model(ModelSpec(name=model_folder))
    anatomy = Anatomy(loaded.model)
    layers = _layers(arm, model_folder, anatomy, watch)
    with watch("tokenise"):
        sequences = sequences_of(loaded)
    spec = RunSpec(
        adapter=AdapterSpec(rank=LORA_RANK, alpha=LORA_ALPHA),
        train=TrainSpec(batch_size=arm.batch, epochs=arm.epochs, learning_rate=LEARNING_RATE),
    )
    with watch("attach"):
        adapted = adapt(loaded.model, spec.adapter, layers, seed=spec.seed)
        train_mode(adapted.model)
    with watch("plan"):
        plan = step_plan(sequences, spec.train, spec.seed)
        plans = [plan(epoch) for epoch in range(arm.epochs)]
    if arm.layout == "flat":
        plans = [flat.steps(sequences, steps, spec.train.row_tokens) for steps in plans]
    gemm_before = measure.gemm_flops(loaded.model.dtype)
    memory = measure.Memory()
    with watch("make_step"):
        step = make_step(adapted.model, sequences, spec.train, clock.say)

    schedule = Schedule(spec.train, plans.__getitem__, len(plans[0]))
    build = flat.tree if arm.layout == "flat" else build_tree
    with watch("fit_into_memory"):
        fitted = fit_into_memory(step, schedule, steps_limit_bytes(), clock.say)
        step_bytes = fitted.needed_bytes
    plans = [[step.parts(groups) for groups in steps] for steps in plans]
    with (
        patch.object(training_step, "build_tree", build),
        kept_for_steps(step_bytes, copies_bytes=copies_worth_bytes(step, schedule)),
    ):
        metrics, start_s = _train(step, schedule, adapted, spec, clock)
    step.close()
    facts = {
        "layers": layers,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "train_loss": sum(m["sum_nats"] for m in metrics) / sum(m["n_tokens"] for m in metrics),
        "said": clock.lines,
        "memory": memory.report(),
    }
    gemm = max(gemm_before, measure.gemm_flops(loaded.model.dtype))
    trees = [[[build(sequences, ids) for ids in step] for step in steps] for steps in plans]
    epochs = _epochs(clock.ticks, trees, sequences, anatomy, layers[0], gemm)
    per_row = {name: watch.seconds.pop(name) / len(sequences) for name in ("tokenise", "plan")}
    one_off = {**watch.seconds, "start": clock.ticks[0] - start_s, "warmup": epochs[0]["warmup_s"]}
    costs = {"one_off_s": one_off, "per_row_s": per_row}
    return {**facts, **costs, "gemm_flops": gemm, "epochs": epochs}


def encode(rows: list[Example], separator: str, loaded: LoadedModel) -> TokenSequences:
    """Tokenise the rows."""
    limits = {"context_tokens": loaded.context_tokens, "truncate": False}
    return encode_examples(rows, separator, loaded.tokenizer, **limits).sequences


def _train(
    step: Any, schedule: Any, adapted: Any, spec: RunSpec, clock: StepClock
) -> tuple[list[dict[str, Any]], float]:
    from swlora.training.loop import train

    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        folder = Path(scratch) / "run"
        start_s = time.perf_counter()
        with Run.create(folder, spec, "train") as run_folder:
            train(step, schedule, adapted, run_folder, clock)
        return read_metrics(folder), start_s


def _epochs(
    ticks: list[float],
    trees: list[list[list[PrefixTree]]],
    sequences: TokenSequences,
    anatomy: Anatomy,
    cut: int,
    gemm: float,
) -> list[dict[str, Any]]:
    """Summarise each epoch: rates, the work it needed and the share of the machine's peak."""
    epochs, first = [], 0
    for epoch, steps in enumerate(trees):
        # The first step of all, but where it computes states for later ones, too.
        n_warmup = 1 if epoch == 0 and cut == 0 else 0
        counts = [sum(tree.n_sequences for tree in step) for step in steps]
        nodes = [sum(len(tree.token_ids) for tree in step) for step in steps]
        report = measure.rates(ticks[first : first + len(steps) + 1], counts, nodes, n_warmup)
        first += len(steps)
        timed = [tree for step in steps[n_warmup:] for tree in step]
        n_nodes = sum(nodes[n_warmup:])
        n_scored = sum(len(np.unique(tree.target_position)) for tree in timed)
        ids = np.concatenate([tree.sequence_ids for tree in timed])
        flops = necessary_flops(anatomy, cut, n_nodes, n_scored, prefix_read=epoch > 0)
        epochs.append(
            {
                **report,
                "tokens": int(sequences.lengths[ids].sum()),
                "scored_positions": n_scored,
                "necessary_flops": flops,
                "gemm_share": flops / report["steady_s"] / gemm,
            }
        )
    return epochs


def _layers(arm: Arm, model_folder: str, anatomy: Anatomy, watch: measure.Stopwatch) -> list[int]:
    if arm.layers is None:
        return list(range(anatomy.n_layers))
    if arm.layers != "super":
        return list(arm.layers)
    from swlora.pipeline import Job, identify

    with watch("identify"), tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        spec = RunSpec(model=ModelSpec(name=model_folder))
        with Run.create(Path(scratch) / "run", spec, "identify") as run_folder:
            return sorted(identify(Job(spec, run_folder, Silent())).layers)
