"""AdaLoRA (arXiv 2303.10512): W + s/r0 B diag(e) A, whose triplets are pruned to a budget of ranks.

    score of a triplet = mean over its entries of (smoothed |w dL/dw|) x (its uncertainty)
    budget(t): r0 for every matrix, then a cubic fall, then the mean rank r that was asked for

PEFT scores, prunes and saves; it leaves it to its caller to call it after every step and to add
the term that keeps A and B orthogonal, weight x mean ||P'P - I||_F. Both are done here.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from swlora.adapters.adapted import NAME, Adapted
from swlora.adapters.site import Site
from swlora.config import AdapterSpec
from swlora.errors import UserError

# From the paper's repository (QingruZhang/AdaLoRA): ranks 12 to 8 and weight 0.1 on XSum and SQuAD;
# of the 3000 steps in its README, 500 before the pruning, 1500 after it, ranks allotted every 10.
FIRST_RANK_OVER_MEAN = 1.5
ORTHOGONALITY_WEIGHT = 0.1
STEPS_BEFORE, STEPS_AFTER, STEPS_BETWEEN = 1 / 6, 1 / 2, 1 / 300
MIN_STEPS = 6  # one step of each phase


def first_rank(spec: AdapterSpec) -> int:
    """Return the rank that every matrix starts with."""
    return math.ceil(FIRST_RANK_OVER_MEAN * spec.rank)


def config(spec: AdapterSpec, site: Site) -> Any:
    """Return PEFT's configuration; UserError where the training is too short to prune in."""
    from peft import AdaLoraConfig

    n_steps = site.n_steps or 0
    if n_steps < MIN_STEPS:
        raise UserError(
            f"adalora prunes while it trains: it needs at least {MIN_STEPS} optimizer steps, and "
            f"this training has {n_steps}; raise --epochs or lower --batch-size"
        )
    return site.config(
        AdaLoraConfig,
        init_r=first_rank(spec),
        target_r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        total_step=n_steps,
        tinit=int(n_steps * STEPS_BEFORE),
        tfinal=int(n_steps * STEPS_AFTER),
        deltaT=max(1, int(n_steps * STEPS_BETWEEN)),
        orth_reg_weight=ORTHOGONALITY_WEIGHT,
    )


class AdaLora(Adapted):
    """Prunes after every step; carries scores and masks through a checkpoint."""

    def __init__(self, model: Any, spec: AdapterSpec) -> None:
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:  # a constant, which PEFT sets free on a bfloat16 model
                parameter.requires_grad_(False)
        super().__init__(model, spec)
        self._config = model.peft_config[NAME]
        self._allocator = model.base_model.rankallocator

    def penalty(self) -> Tensor:
        """Return the weighted mean of ||P'P - I||_F over all A' and B, as PEFT adds it."""
        a = [p for name, p in self.parameters.items() if ".lora_A." in name]
        b = [p.t() for name, p in self.parameters.items() if ".lora_B." in name]
        products = torch.stack([p @ p.t() for p in a + b])  # (matrices, r, r)
        identity = torch.eye(products.shape[1], dtype=products.dtype, device=products.device)
        distance = torch.linalg.matrix_norm(products - identity).mean()
        weighted: Tensor = self._config.orth_reg_weight * distance
        return weighted

    def after_step(self, n_done: int) -> None:
        """Score all triplets by their gradients; set those beyond the budget to zero."""
        self.model.base_model.update_and_allocate(n_done)

    @property
    def score_bytes(self) -> int:
        """As many as the weights: PEFT keeps the last, the smoothed and the uncertainty of each."""
        return sum(p.nbytes for p in self.parameters.values())

    def state(self) -> dict[str, Tensor]:
        """Return the smoothed scores, and which triplets are kept."""
        scores = self._allocator.exp_avg_ipt.items()
        uncertainties = self._allocator.exp_avg_unc.items()
        kept = (self._config.rank_pattern or {}).items()
        return {
            **{f"score/{name}": tensor for name, tensor in scores},
            **{f"uncertainty/{name}": tensor for name, tensor in uncertainties},
            **{f"kept/{name}": torch.tensor(mask) for name, mask in kept},
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over scores and kept triplets."""
        by_kind: dict[str, dict[str, Tensor]] = {"score": {}, "uncertainty": {}, "kept": {}}
        for full_name, tensor in tensors.items():
            kind, _, name = full_name.partition("/")
            by_kind[kind][name] = tensor.to(self.model.device)
        allocator = self._allocator
        allocator.exp_avg_ipt, allocator.exp_avg_unc = by_kind["score"], by_kind["uncertainty"]
        allocator.ipt = dict(by_kind["score"])  # its names say that there are scores already
        kept = {name: mask.tolist() for name, mask in by_kind["kept"].items()}
        self._config.rank_pattern = kept or None

    def finish(self) -> None:
        """Keep the triplets of the last pruning, and those that have grown again since then.

        PEFT drops the others where it saves. Before the first pruning it keeps all of them.
        """
        if self._config.rank_pattern:
            self._config.rank_pattern = {
                name: (torch.tensor(kept) | self._has_grown(name)).tolist()
                for name, kept in self._config.rank_pattern.items()
            }

    def _has_grown(self, name: str) -> torch.Tensor:
        values: torch.Tensor = self.model.base_model.model.get_parameter(name).detach()
        return (values != 0).flatten().cpu()

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Have the ranks of this step while the body runs."""
        allotted = self._config.rank_pattern
        self.finish()
        try:
            yield
        finally:
            self._config.rank_pattern = allotted

    @property
    def ranks(self) -> dict[str, int] | None:
        """The ranks that are left."""
        pattern: dict[str, list[bool]] = self._config.rank_pattern or {}
        return {name.partition(".lora_E")[0]: sum(mask) for name, mask in pattern.items()} or None
