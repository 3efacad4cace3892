"""PiSSA (arXiv 2404.02948): LoRA that starts from the principal part of each weight.

    W = U S V'    s B0 A0 = U_r S_r V_r'    trained: W_res + s B A,  W_res = W - s B0 A0
    saved: W + s [B, -B0] [A; A0], a plain LoRA of rank 2r on the original weights (section 3)

The decomposition is made in float32. W_res is held in the model's dtype: in bfloat16 it is rounded
once, by up to 1/256 of its own entries, and what is saved differs from what was trained by that
rounding; in float32 the two agree to float32's own. The original weights are kept aside and are
given back bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swlora.adapters.adapted import NAME, Adapted
from swlora.config import AdapterSpec


class Pissa(Adapted):
    """Moves the principal part of every adapted weight into its adapter, and back in the end."""

    def __init__(self, model: Any, spec: AdapterSpec) -> None:
        from peft.tuners.lora import LoraLayer

        super().__init__(model, spec)
        self._starts: list[tuple[Any, Tensor, Tensor, Tensor]] = []  # layer, W, A0, B0
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                original = layer.get_base_layer().weight.data
                layer.pissa_init(NAME, "pissa")  # puts another tensor into the base layer
                a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
                self._starts.append((layer, original, a.detach().clone(), b.detach().clone()))

    def finish(self) -> None:
        """Give the original weights back; the adapter becomes the difference, of rank 2r."""
        self._convert()
        self._starts = []

    def _convert(self) -> None:
        for layer, original, a_start, b_start in self._starts:
            layer.get_base_layer().weight.data = original
            a, b = layer.lora_A[NAME], layer.lora_B[NAME]
            a.weight = nn.Parameter(torch.cat([a.weight.detach(), a_start], dim=0))
            b.weight = nn.Parameter(torch.cat([b.weight.detach(), -b_start], dim=1))
            a.out_features = b.in_features = layer.r[NAME] = 2 * layer.r[NAME]
            layer.lora_alpha[NAME] *= 2  # the scale, alpha / r, stays
        config = self.model.peft_config[NAME]
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Be the adapter of rank 2r on the original weights while the body runs."""
        layers = [layer for layer, *_ in self._starts]
        residuals = [layer.get_base_layer().weight.data for layer in layers]
        trained = [(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight) for layer in layers]
        self._convert()
        try:
            yield
        finally:
            for layer, residual, (a, b) in zip(layers, residuals, trained, strict=True):
                layer.get_base_layer().weight.data = residual
                layer.lora_A[NAME].weight, layer.lora_B[NAME].weight = a, b
                layer.r[NAME] //= 2
                layer.lora_A[NAME].out_features = layer.lora_B[NAME].in_features = layer.r[NAME]
                layer.lora_alpha[NAME] /= 2
            config = self.model.peft_config[NAME]
            config.r, config.lora_alpha = config.r // 2, config.lora_alpha / 2
