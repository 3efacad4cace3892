#!/usr/bin/env bash
# PEFT: unload() of a model with modules_to_save gives back the trained copies, not the base model.
#
# PEFT trains a copy of each module that `modules_to_save` names, keeps the original beside it, and
# uses that one inside disable_adapter(). unload() is documented to return the base model; it does
# so for LoRA's own layers, but in the place of a saved module it leaves the trained copy. So the
# model that comes back computes something else than the base model, and than the same model with
# its adapter disabled a moment before. Seen in peft 0.21.2 (torch 2.13.0, transformers 5.23.0).
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

print("peft", peft.__version__, "torch", torch.__version__)


class Net(nn.Module):
    """Two linear maps: one gets LoRA, the other is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


torch.manual_seed(0)
net, x = Net(), torch.ones(2, 8)
original = {name: weight.clone() for name, weight in net.state_dict().items()}
plain = net(x).detach()
model = get_peft_model(net, LoraConfig(target_modules=["body"], modules_to_save=["head"]))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
model(x).square().sum().backward()
optimizer.step()
with model.disable_adapter():
    disabled = model(x).detach()
unloaded = model.unload()
same = {name: torch.equal(weight, original[name]) for name, weight in unloaded.state_dict().items()}
print("weights that are the original ones after unload():", same)
print("outputs, largest difference from the base model:")
print(f"  adapter disabled {float((disabled - plain).abs().max()):.3f}")
print(f"  unloaded         {float((unloaded(x).detach() - plain).abs().max()):.3f}")
is_disabled_right = torch.equal(disabled, plain)
sys.exit(0 if is_disabled_right and same == {"body.weight": True, "head.weight": False} else 1)
PYTHON
