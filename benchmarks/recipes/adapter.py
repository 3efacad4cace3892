"""What a recipe trains: a method, in which projections of which layers, from which start."""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.recipes.recipe import Recipe
from benchmarks.recipes.rows import Rows
from benchmarks.recipes.starts import leading_inputs, sums_of_shards
from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import ALL_LINEAR, adapt, adapted_modules, trainable_parameters
from swlora.config import AdapterSpec, TrainSpec, settings_of
from swlora.data.prefix_tree import build_tree
from swlora.data.steps import plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.layer_policy import parse_policy
from swlora.models.anatomy import Anatomy, Family, bias_out, weight_out_in
from swlora.training.schedule import Schedule, Step

GRADIENT_ROWS, PLOP_ROWS = 64, 32

Pair = tuple[nn.Parameter, nn.Parameter]


def make_adapter(model: Any, recipe: Recipe, rows: Rows, seed: int) -> Adapted:
    """Put the adapter of a recipe into the model; `rows` are those that it will train on."""
    anatomy = Anatomy(model)
    method = "lora" if recipe.method == "miss" else recipe.method
    size = {"rank": recipe.rank, "alpha": recipe.scale_value * recipe.rank}
    spec = AdapterSpec(
        method=method,
        targets=targets(model, recipe.targets, rows.sequences),
        **{name: value for name, value in size.items() if name in settings_of(method)},
    )
    starts: dict[nn.Module, Tensor] = {}
    if recipe.gradient_start is not None:
        few = next(Schedule.of(rows.sequences, TrainSpec(batch_size=GRADIENT_ROWS), seed).steps())
        starts = leading_inputs(model, rows.sequences, few, recipe.rank)
    layers = parse_policy(recipe.layers).resolve(anatomy.n_layers)
    adapted = adapt(model, spec, layers, seed=seed, n_steps=recipe.steps)
    has_own_start = recipe.method == "miss" or recipe.gradient_start is not None
    for layer in adapted_modules(adapted.model).values() if has_own_start else ():
        a: nn.Parameter = layer.lora_A["default"].weight
        if recipe.method == "miss":
            a.data = sums_of_shards(*a.shape).to(a)
            a.requires_grad_(False)
        else:
            a.data = starts[layer.base_layer] * recipe.gradient_start
    adapted.parameters = trainable_parameters(adapted.model)
    return adapted


def take_out(adapted: Adapted) -> None:
    """Leave the model as it was before `make_adapter`; after `finish`, if the steps were made."""
    from peft.utils.other import ModulesToSaveWrapper

    originals = {
        name.removeprefix("base_model.model."): module.original_module
        for name, module in adapted.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    # It leaves trained copies of whole modules: findings/peft_unload_keeps_saved_modules.sh
    model = adapted.model.unload()
    for name, module in originals.items():
        model.set_submodule(name, module)


def pairs(adapted: Adapted) -> list[Pair]:
    """Return the trained (A, B) of every adapted projection."""
    return [
        (a, adapted.parameters[name.replace(".lora_A.", ".lora_B.")])
        for name, a in adapted.parameters.items()
        if ".lora_A." in name
    ]


def targets(model: Any, text: str, sequences: TokenSequences) -> list[str]:
    """Return what AdapterSpec is to adapt for the `targets` of a recipe."""
    family: Family = Anatomy(model).family
    if text == "all":
        return [ALL_LINEAR]
    if text == "mlp":
        return [*family.mlp_in, family.mlp_out]
    if text == "attention":
        return [*family.attention_in, family.attention_out]
    if text.startswith("plop:"):
        norms = feature_norms(model, sequences, _few_rows(sequences))
        return sorted(norms, key=lambda name: norms[name])[: int(text.removeprefix("plop:"))]
    return text.split(",")


@torch.no_grad()
def feature_norms(model: Any, sequences: TokenSequences, step: Step) -> dict[str, float]:
    """Return the normalised feature norm of every kind of projection, the mean over layers.

    ||W x|| over what it is for a random input of the same length, ||W||_F ||x|| / sqrt(in); PLoP
    (arXiv 2506.20629) adapts the kinds where it is lowest. The mean is over tokens of the step.
    """
    found: dict[str, list[float]] = defaultdict(list)
    walk = TreeWalk(model, 0)
    with ExitStack() as hooks:
        for projection in Anatomy(model).all_projections():
            measure = partial(_measure, found[projection.name])
            hooks.callback(projection.module.register_forward_hook(measure).remove)
        for ids in step:
            walk.whole(TreeLayout(build_tree(sequences, ids), model.device))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _measure(found: list[float], module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    weight, bias, x = weight_out_in(module).float(), bias_out(module), inputs[0].float()
    made = output.float() if bias is None else output.float() - bias
    of_random = x.norm(dim=-1) * weight.norm() / weight.shape[1] ** 0.5
    found.append(float((made.norm(dim=-1) / of_random).mean()))


def _few_rows(sequences: TokenSequences) -> Step:
    settings = {"sequences_per_step": PLOP_ROWS, "max_tokens_per_tree": 4096}
    return plan_steps(sequences, **settings, order="iid", seed=0, epoch=0)[0]
