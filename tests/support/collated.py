"""Batches as the collators of transformers make them, and what transformers says of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from swlora.adapters.methods import trainable_parameters

IGNORED, PAD = -100, 11
Row = tuple[list[int], list[int]]  # token ids, labels
Batch = dict[str, Any]


def labelled(pairs: Sequence[tuple[list[int], list[int]]], seed: int = 6) -> list[Row]:
    """Rows of (prompt, completion): labels on completions, some left out, one in some prompts."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt, completion in pairs:
        ids = [*prompt, *completion]
        labels = np.array([IGNORED] * len(prompt) + completion)
        labels[len(prompt) :][rng.random(len(completion)) < 0.2] = IGNORED
        if len(prompt) > 3 and rng.random() < 0.3:
            labels[2] = ids[2]
        rows.append((ids, labels.tolist()))
    return rows


def padded(rows: Sequence[Row], side: str) -> Batch:
    """Pad to one token more than the longest row, on the "left" or the "right"."""
    width = 1 + max(len(ids) for ids, _ in rows)

    def column(values: Sequence[list[int]], pad: int) -> Tensor:
        gaps = [[pad] * (width - len(v)) for v in values]
        pairs = zip(values, gaps, strict=True)
        return torch.tensor([gap + v if side == "left" else v + gap for v, gap in pairs])

    return {
        "input_ids": column([ids for ids, _ in rows], PAD),
        "labels": column([labels for _, labels in rows], IGNORED),
        "attention_mask": column([[1] * len(ids) for ids, _ in rows], 0),
    }


def packed(rows: Sequence[Row]) -> Batch:
    """Put all rows into one, as transformers' own collator does it."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch: Batch = collate([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    return batch


LAYOUTS: dict[str, Callable[[Sequence[Row]], Batch]] = {
    "left": lambda rows: padded(rows, "left"),
    "right": lambda rows: padded(rows, "right"),
    "packed": packed,
}


def plain_loss(model: Any, batch: Batch, **more: Any) -> Tensor:
    """What transformers and PEFT say; without a cache packed rows do not see each other."""
    loss: Tensor = model(**batch, **more, use_cache=False).loss
    return loss


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every trained parameter, and forget it."""
    torch.autograd.backward(loss)
    found = {}
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name], parameter.grad = parameter.grad, None
    return found


def assert_same_gradients(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((found[name].double() - gradient.double()).norm() / gradient.double().norm())
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
