"""Recipes that might reach the loss of LoRA in all layers sooner: other batches, orders and starts.

    python -m benchmarks.recipes --json F [--e2e FOLDER] [--recipes 'a; b'] [--seed N]

All run in this one process, one after another. Each trains the embedded model once, for the steps
it names, with a rate that decays to zero over them, and ends with the loss on all rows of the first
60 dev prompts. `baseline` is what the others are held against, `half` the same in half of the
steps. Seconds are those of the steps, and of what a recipe does before them, after a step that is
not timed. docs/results.md has what came out of such recipes.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import runner
from benchmarks.rows import find_e2e
from swlora.adapters.methods import adapt, train_mode
from swlora.config import AdapterSpec, DataSpec, ModelSpec, TrainSpec
from swlora.data.encode import encode_examples
from swlora.data.prefix_tree import build_tree
from swlora.data.sources import load_dataset
from swlora.data.steps import StepOrder
from swlora.data.token_sequences import TokenSequences
from swlora.evaluation.loss import dataset_loss
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.models.anatomy import Anatomy, weight_out_in
from swlora.models.load import load_model
from swlora.progress import Silent
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep, tree_nats

DEV_PROMPTS = 60
GRADIENT_ROWS = 64


@dataclass(frozen=True)
class Recipe:
    """One training.

    `gradient_start`: A begins as the leading right singular vectors of the gradient of each frozen
    weight, times this length, instead of at random; B at zero as ever.
    """

    steps: int
    batch: int = 32
    rate: float = 4e-3
    rank: int = 4
    order: StepOrder = "prompts"
    prompts: int | None = None  # the first N of the training file; None: all of it
    gradient_start: float | None = None


RECIPES = {
    "baseline": Recipe(76, prompts=220),
    "half": Recipe(38, prompts=220),
    "half, 16 rows a step": Recipe(76, batch=16, prompts=220),
    "half, rank 16": Recipe(38, rank=16, prompts=220),
    "half, gradient start": Recipe(38, rate=5e-4, prompts=220, gradient_start=1.0),
    "half, gradient start, higher rate": Recipe(38, rate=1e-3, prompts=220, gradient_start=1.0),
    "half, gradient start, same rate": Recipe(38, prompts=220, gradient_start=1.0),
    "half, shorter gradient start": Recipe(38, rate=2e-3, prompts=220, gradient_start=0.2),
    "whole file": Recipe(75),
    "whole file, single rows": Recipe(40, order="iid"),
    "whole file, pairs": Recipe(50, order="pairs"),
    "whole file, pairs, 16 rows a step": Recipe(50, batch=16, order="pairs"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Recipes for the same loss in less time.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    parser.add_argument("--recipes", default="; ".join(RECIPES), help='by name: "half; baseline"')
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = [name.strip() for name in args.recipes.split(";")]
    if unknown := [name for name in names if name not in RECIPES]:
        raise SystemExit(f"no recipe is called {unknown[0]!r}; there are {'; '.join(RECIPES)}")

    from swlora.files import write_json

    bench, results, load = Bench(find_e2e(args.e2e)), {}, runner.load()
    for name in names:
        results[name] = bench.run(RECIPES[name], args.seed)
        print(
            f"{name}: {results[name]['nll']:.4f} nats, {results[name]['train_s']:.0f} s", flush=True
        )
    machine = {"machine": runner.machine(), "load_average": {"start": load, "end": runner.load()}}
    machine |= {"seed": args.seed, "dev_prompts": DEV_PROMPTS}
    write_json(args.json, {"benchmark": "recipes", **machine, "recipes": results})


class Bench:
    """The model and the data, loaded once."""

    def __init__(self, e2e: Path) -> None:
        self._e2e = str(e2e)
        self._loaded = load_model(ModelSpec(name=runner.builtin_model()))
        self._dev = self._rows("dev", DataSpec(name=self._e2e, eval_prompts=DEV_PROMPTS))

    def run(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Train by a recipe; return what it took and the loss on the dev rows."""
        spec = TrainSpec(
            batch_size=recipe.batch,
            learning_rate=recipe.rate,
            max_steps=recipe.steps,
            order=recipe.order,
        )
        rows = self._rows("train", DataSpec(name=self._e2e, train_prompts=recipe.prompts))
        schedule = Schedule.of(rows, spec, seed)
        self._warm_up(rows, schedule)
        start_s = time.perf_counter()
        starts = {}
        if recipe.gradient_start is not None:
            few = next(Schedule.of(rows, TrainSpec(batch_size=GRADIENT_ROWS), seed).steps())
            starts = leading_inputs(self._loaded.model, rows, few, recipe.rank)
        adapter = AdapterSpec(rank=recipe.rank, alpha=8.0 * recipe.rank)
        n_layers = Anatomy(self._loaded.model).n_layers
        adapted = adapt(self._loaded.model, adapter, range(n_layers), seed=seed)
        for layer in adapted.model.modules():
            base = getattr(layer, "base_layer", None)
            if base in starts:
                layer.lora_A["default"].weight.data = starts[base] * recipe.gradient_start
        n_rows = descend(TreeStep(adapted.model, rows), schedule, adapted)
        train_s = time.perf_counter() - start_s
        loss = dataset_loss(adapted.model.eval(), self._dev, Silent())
        adapted.model.unload()
        return {**asdict(recipe), "rows": n_rows, "train_s": train_s, "nll": loss.nats_per_token}

    def _warm_up(self, rows: TokenSequences, schedule: Schedule) -> None:
        """Run a step, so that every recipe begins with laid-out weights and warm memory."""
        n_layers = Anatomy(self._loaded.model).n_layers
        adapted = adapt(self._loaded.model, AdapterSpec(), range(n_layers), seed=0)
        train_mode(adapted.model)
        TreeStep(adapted.model, rows)(next(schedule.steps()))
        adapted.model.unload()

    def _rows(self, split: str, data: DataSpec) -> TokenSequences:
        dataset, loaded = load_dataset(data), self._loaded
        limits = {"context_tokens": loaded.context_tokens, "truncate": False}
        rows = dataset.split(split)
        return encode_examples(rows, dataset.separator, loaded.tokenizer, **limits).sequences


def descend(step: TreeStep, schedule: Schedule, adapted: Any) -> int:
    """Run the steps of a schedule with AdamW as the training loop does; return the rows."""
    parameters, n_rows = list(adapted.parameters.values()), 0
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    train_mode(adapted.model)
    for number, rows in enumerate(schedule.steps()):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(number)
        n_tokens = step(rows).n_tokens
        torch._foreach_mul_([p.grad for p in parameters], 1.0 / n_tokens)
        nn.utils.clip_grad_norm_(parameters, schedule.spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_rows += sum(map(len, rows))
    return n_rows


def leading_inputs(
    model: Any, rows: TokenSequences, step: Any, rank: int
) -> dict[nn.Module, torch.Tensor]:
    """Return by projection the leading right singular vectors of its gradient, (rank, in)."""
    projections = [p.module for p in Anatomy(model).all_projections()]
    for module in projections:
        module.weight.requires_grad_(True)
    walk = TreeWalk(model, 0)
    with patched_forwards(fast_forwards(model)):
        for ids in step:
            tree = build_tree(rows, ids)
            hidden = walk.whole(TreeLayout(tree, model.device))
            torch.autograd.backward(tree_nats(walk, tree, hidden))
    found = {}
    for module in projections:
        gradient, module.weight.grad = module.weight.grad, None
        module.weight.requires_grad_(False)
        assert weight_out_in(module).shape == gradient.shape
        torch.manual_seed(0)
        found[module] = torch.svd_lowrank(gradient.float(), q=rank + 20)[2][:, :rank].T.contiguous()
    return found


if __name__ == "__main__":
    main()
