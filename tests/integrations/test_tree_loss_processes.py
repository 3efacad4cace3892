"""tree_loss in several processes: where DistributedDataParallel averages, and nowhere else."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.collated import Batch, gradients, labelled, padded
from tests.support.sequences import branching
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from swlora import tree_loss
from swlora.adapters.methods import trainable_parameters
from swlora.errors import UserError


class Around(nn.Module):
    """A module whose forward is the loss, as that of a LightningModule in its strategy is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return tree_loss(self.model, **batch)


def _rank(rank: int, folder: Path, model: Any, batches: list[Batch]) -> None:
    """Save the gradients that a process has, which must not be its own alone."""
    torch.set_num_threads(1)
    how = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": len(batches)}
    distributed.init_process_group("gloo", **how)
    with pytest.raises(UserError, match="several processes are at work"):
        tree_loss(model, **batches[rank])
    with pytest.raises(UserError, match="not a DistributedDataParallel; patch the model before"):
        tree_loss(DistributedDataParallel(model), **batches[rank])
    around = DistributedDataParallel(Around(model))
    for step in range(2):
        around(batches[rank]).backward()
        found = {name: p.grad for name, p in trainable_parameters(model).items()}
        save_file(found, folder / f"{rank}-{step}.safetensors")
        model.zero_grad()
    distributed.barrier()
    os._exit(0)  # to let go of DistributedDataParallel and of the group after it may wait for ever


def test_gradients_are_averaged_in_the_forward_of_ddp(model: Any, tmp_path: Path) -> None:
    rows = labelled(branching())
    batches = [padded(rows[::2], "right"), padded(rows[1::2], "right")]
    how = {"nprocs": len(batches), "join": False, "daemon": True}
    ranks = multiprocessing.spawn(_rank, (tmp_path, model, batches), **how)
    assert any(ranks.join(60) for _ in batches)  # it returns with each that ends
    own = [gradients(model, tree_loss(model, **batch)) for batch in batches]
    found = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert len(found) == 2 * len(batches)
    for of_step in found:
        for name, gradient in of_step.items():
            expected = (own[0][name] + own[1][name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
