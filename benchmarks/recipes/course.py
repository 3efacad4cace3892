"""One training by a recipe: its seconds, and the loss on held-out rows over its course."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes.adapter import make_adapter, take_out
from benchmarks.recipes.choice import chosen, without_some
from benchmarks.recipes.descent import Descent, NotFiniteError, rate_at, schedule_of
from benchmarks.recipes.ends import Average, Jumps
from benchmarks.recipes.recipe import Recipe
from benchmarks.recipes.rows import Data, Rows
from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import train_mode
from swlora.config import ModelSpec
from swlora.data.prefix_tree import build_tree
from swlora.evaluation.loss import grouped_losses, trees_at_once
from swlora.kernels.forwards import refresh
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_layout import TreeLayout
from swlora.loss_sum import LossSum
from swlora.models.load import load_model
from swlora.progress import Silent
from swlora.training.step import TreeStep, tree_nats


class Clock:
    """Seconds of this process's cores, and of the wall, while it runs."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run while the body does."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu_s += time.process_time() - cpu_s
            self.wall_s += time.perf_counter() - wall_s

    def read(self) -> dict[str, float]:
        """Return the seconds so far."""
        return {"cpu_s": round(self.cpu_s, 3), "wall_s": round(self.wall_s, 3)}


class Bench:
    """The model, loaded once, and the data sets."""

    def __init__(self, model: str, e2e: Path | None, n_points: int) -> None:
        self._loaded = load_model(ModelSpec(name=model))
        self._e2e, self._n_points = e2e, n_points
        self._data: dict[str, Data] = {}
        self._is_warm = False

    def run(self, recipe: Recipe, seed: int, *, with_test: bool) -> dict[str, Any]:
        """Train by a recipe; return what it took and where it came to.

        On the clock is all that the recipe does: what it chooses and starts from, its steps, jumps
        and means. Not on it: reading the data, laying out weights, and what is measured.
        """
        data = self._data.setdefault(recipe.data, Data(recipe.data, self._loaded, self._e2e))
        rows = data.train.first_prompts(recipe.prompts)
        self._warm_up(rows)
        clock = Clock()
        with clock.running():
            rows, held_out = self._rows(recipe, rows, seed)
            adapted = make_adapter(self._loaded.model, recipe, rows, seed)
        before_s = clock.read()
        try:
            course = Course(recipe, rows, held_out, adapted, clock)
            try:
                found = course.run(seed, data.curve, self._n_points)
            finally:
                adapted.finish()
            if "error" not in found:
                adapted.model.eval()
                found["dev"] = by_prompt(adapted.model, data.dev)
                if with_test:
                    found["test"] = by_prompt(adapted.model, data.test)
        finally:
            take_out(adapted)
        return {"threads": torch.get_num_threads(), "before_steps": before_s, **found}

    def _rows(self, recipe: Recipe, rows: Rows, seed: int) -> tuple[Rows, Rows | None]:
        """Return the rows that are trained on, and those that jumps are measured on."""
        held_out = None
        if recipe.jump:
            rows, held_out = without_some(rows, seed)
        if recipe.rows is not None:
            choice = recipe.choice or "random"
            rows = chosen(rows, recipe.rows, choice, self._loaded.model, seed)
        return rows, held_out

    def _warm_up(self, rows: Rows) -> None:
        """Make a step before the first training, so that it finds memory as the others do."""
        if self._is_warm:
            return
        recipe = Recipe(steps=1, batch=min(32, len(rows)))
        adapted = make_adapter(self._loaded.model, recipe, rows, seed=0)
        train_mode(adapted.model)
        TreeStep(adapted.model, rows.sequences)(
            next(schedule_of(rows.sequences, recipe, 0).steps())
        )
        adapted.model.unload()
        self._is_warm = True


class HeldOutLoss:
    """The loss on rows in nats a token, with the forwards of a training step."""

    def __init__(self, step: TreeStep, rows: Rows) -> None:
        self._step, sides = step, step.walk.rotary.sides
        parts = (
            p for ids in trees_at_once(rows.sequences) for p in sides(ids, rows.sequences.lengths)
        )
        trees = [build_tree(rows.sequences, part) for part in parts]
        self._trees = [(tree, TreeLayout(tree, step.base_model.device)) for tree in trees]

    @torch.no_grad()
    def __call__(self) -> float:
        """Measure with the weights that the adapter has now."""
        walk, forwards, total = self._step.walk, self._step.forwards, LossSum()
        refresh(forwards)
        with patched_forwards(forwards):
            for tree, layout in self._trees:
                nats = float(tree_nats(walk, tree, walk.whole(layout)))
                total += LossSum(nats, tree.n_target_tokens)
        return total.nats_per_token


class Course:
    """The steps of one training."""

    def __init__(
        self, recipe: Recipe, rows: Rows, held_out: Rows | None, adapted: Adapted, clock: Clock
    ) -> None:
        self._recipe, self._rows, self._adapted, self._clock = recipe, rows, adapted, clock
        self._step = TreeStep(adapted.model, rows.sequences)
        self._step.forwards  # noqa: B018 - weights are laid out before the clock runs
        self._descent = Descent.of(self._step, adapted, recipe)
        parameters = self._descent.parameters
        self._average = Average(parameters)
        self._jumps = None
        if held_out is not None:
            self._jumps = Jumps(parameters, HeldOutLoss(self._step, held_out))

    def run(self, seed: int, curve_rows: Rows, n_points: int) -> dict[str, Any]:
        """Make the steps; measure at `n_points` of them, evenly spaced, the last among them."""
        recipe, clock = self._recipe, self._clock
        points = {round((i + 1) * recipe.steps / n_points) for i in range(n_points)}
        curve, n_rows, n_tokens = [], 0, 0.0
        loss = HeldOutLoss(self._step, curve_rows)
        schedule = schedule_of(self._rows.sequences, recipe, seed)
        train_mode(self._adapted.model)
        for number, groups in enumerate(schedule.steps(), start=1):
            try:
                with clock.running():
                    n_tokens += self._one(number, groups)
            except NotFiniteError as error:
                return {"error": str(error), **clock.read()}
            n_rows += sum(map(len, groups))
            if number in points:
                with self._average.applied():
                    nll = loss()
                if not math.isfinite(nll):
                    return {
                        "error": f"the held-out loss is not finite after step {number}"
                    } | clock.read()
                curve.append({"step": number, **clock.read(), "nll": nll})
        with clock.running():
            self._average.apply()
        jumps = {"jumps": self._jumps.repeats} if self._jumps else {}
        n_trained = sum(p.numel() for p in self._descent.parameters)
        counts = {"rows": n_rows, "tokens": n_tokens, "nodes": self._step.work.n_nodes}
        return {**clock.read(), **counts, "trained_weights": n_trained, **jumps, "curve": curve}

    def _one(self, number: int, groups: Any) -> float:
        """Make step `number` (from 1), with the jump that follows it; return its tokens."""
        recipe, jumps = self._recipe, self._jumps
        is_jump = jumps is not None and number % recipe.jump == 0 and not jumps.is_over
        if jumps is not None and is_jump:
            jumps.before_step()
        n_tokens = self._descent.step(groups, rate_at(recipe, number - 1))
        if jumps is not None and is_jump:
            jumps.after_step()
        if number > recipe.steps - recipe.n_averaged:
            self._average.add()
        return n_tokens


def by_prompt(model: Any, rows: Rows) -> dict[str, Any]:
    """Return the loss on rows, in nats a token, and what makes it up by prompt: nats, tokens."""
    losses = grouped_losses(model, rows.sequences, rows.prompt_of, Silent())
    nats, tokens = [loss.sum_nats for loss in losses], [loss.n_tokens for loss in losses]
    return {"nll": sum(nats) / sum(tokens), "nats": nats, "tokens": tokens}
