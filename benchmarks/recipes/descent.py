"""The steps of a recipe: its optimiser, its rate at every step, a step as the loop makes it."""

import math
from typing import Any

import torch
from torch import nn

from benchmarks.optimizers.lora_muon import LoraMuon
from benchmarks.optimizers.lora_rite import LoraRite
from benchmarks.recipes.adapter import pairs
from benchmarks.recipes.recipe import Recipe
from swlora.adapters.adapted import Adapted
from swlora.config import TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.training.optimizer import rate_groups
from swlora.training.schedule import Schedule, Step, learning_rate
from swlora.training.step import TreeStep


class NotFiniteError(Exception):
    """A loss, a gradient or a weight is not finite."""


def schedule_of(rows: TokenSequences, recipe: Recipe, seed: int) -> Schedule:
    """Return the steps of a recipe on these rows; as many epochs as they take."""
    n_epochs = math.ceil(recipe.steps * recipe.batch / len(rows)) + 1
    spec = TrainSpec(
        batch_size=min(recipe.batch, len(rows)),
        max_steps=recipe.steps,
        order=recipe.order,
        epochs=n_epochs,
    )
    return Schedule.of(rows, spec, seed)


def rate_at(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step (0-based): warm-up, then the recipe's schedule.

    sqrt:SHARE is constant, then rate (1 - sqrt(progress)) over the last SHARE (arXiv 2405.18392).
    """
    name = "constant" if recipe.sqrt_share else recipe.schedule
    spec = TrainSpec(learning_rate=recipe.rate, warmup_fraction=recipe.warmup, schedule=name)
    rate = learning_rate(spec, step, recipe.steps)
    if recipe.sqrt_share:
        n_decayed = recipe.sqrt_share * recipe.steps
        rate *= 1 - math.sqrt(max(0.0, (step - recipe.steps + n_decayed) / n_decayed))
    return rate


def make_optimizer(adapted: Adapted, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe over what is trained."""
    from peft.optimizers import create_riemannian_optimizer

    betas, adamw = (recipe.beta1, recipe.beta2), torch.optim.AdamW
    settings: dict[str, Any] = {"lr": recipe.rate, "weight_decay": recipe.decay}
    match recipe.optimizer:
        case "lora-muon":
            return LoraMuon(pairs(adapted), momentum=recipe.beta1, **settings)
        case "lora-rite":
            return LoraRite(pairs(adapted), betas=betas, clip=recipe.clip, **settings)
        case "scaled-adamw":
            settings |= {"betas": betas, "fused": True, "reg": recipe.damping}
            scaled: torch.optim.Optimizer
            scaled = create_riemannian_optimizer(adapted.model, adamw, **settings)
            return scaled
    return adamw(rate_groups(adapted), betas=betas, fused=True, **settings)


class Descent:
    """Steps of an optimiser on what a step function leaves as gradients.

    `clip` is the largest norm of the gradient, None for any. The first `b_alone` steps leave every
    A as it is.
    """

    def __init__(
        self,
        step: TreeStep,
        adapted: Adapted,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = 1.0,
        b_alone: int = 0,
    ) -> None:
        self._step, self._optimizer, self._clip, self._b_alone = step, optimizer, clip, b_alone
        self._adapted = adapted
        self.parameters = list(adapted.parameters.values())
        self._all_a = [p for name, p in adapted.parameters.items() if ".lora_A." in name]
        self._n_done = 0

    @classmethod
    def of(cls, step: TreeStep, adapted: Adapted, recipe: Recipe) -> "Descent":
        """Return the descent of a recipe; LoRA-RITE has a clip of its own, LoRA-Muon none."""
        clip = recipe.clip if recipe.optimizer in ("adamw", "scaled-adamw") else None
        optimizer = make_optimizer(adapted, recipe)
        return cls(step, adapted, optimizer, clip=clip, b_alone=recipe.b_alone)

    def step(self, rows: Step, rate: float) -> float:
        """Make a step on these rows; return the tokens that were trained, by their weights.

        Raises NotFiniteError where loss, gradient or weights are not finite.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        loss = self._step(rows)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / loss.n_tokens)
        if (penalty := self._adapted.penalty()) is not None:
            torch.autograd.backward(penalty)
        norm = nn.utils.clip_grad_norm_(self.parameters, self._clip or math.inf)
        if not (math.isfinite(loss.sum_nats) and math.isfinite(norm)):
            raise NotFiniteError(
                f"the loss or its gradient is not finite in step {self._n_done + 1}"
            )
        if self._n_done < self._b_alone:
            for a in self._all_a:
                a.grad = None
        self._optimizer.step()
        self._n_done += 1
        self._adapted.after_step(self._n_done)
        self._optimizer.zero_grad(set_to_none=True)
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.parameters]))
        if not norms.isfinite().all():
            raise NotFiniteError(f"the weights are not finite after step {self._n_done}")
        return loss.n_tokens
