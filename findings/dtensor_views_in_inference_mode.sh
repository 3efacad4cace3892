#!/usr/bin/env bash
# Under torch.inference_mode, a DTensor cannot be detached, transposed or viewed.
#
# Seen in torch 2.13.0, on a mesh of one gloo process: `w.detach()`, `w.t()` and `w.view(...)` of a
# DTensor that was made outside raise "Cannot set version_counter for inference tensor". Products,
# `full_tensor()` and `to_local()` work there, and so does all of it under torch.no_grad, and with
# ordinary tensors under inference_mode. FSDP2's parameters are DTensors between forwards, so that
# code which looks at them while it measures a held-out loss has to take no_grad.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import os
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

one_process = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29677"}
os.environ |= one_process
plain = torch.randn(4, 4)
divided = distribute_tensor(plain.clone(), init_device_mesh("cpu", (1,)), [Shard(0)])
VIEWS = {"detach": lambda w: w.detach(), "t": lambda w: w.t(), "view": lambda w: w.view(16)}
OTHERS = {
    "product": lambda w: w * 2,
    "full_tensor": lambda w: w.full_tensor() if w is divided else w,
    "to_local": lambda w: w.to_local() if w is divided else w,
}


def raised(weight, operations, context):
    found = {}
    for name, operation in operations.items():
        try:
            with context():
                operation(weight)
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found


print("torch", torch.__version__)
failing = raised(divided, VIEWS, torch.inference_mode)
print("DTensor, inference_mode:", failing)
working = [
    raised(divided, OTHERS, torch.inference_mode),
    raised(divided, VIEWS | OTHERS, torch.no_grad),
    raised(plain, VIEWS | OTHERS, torch.inference_mode),
]
print("its other operations; no_grad; an ordinary tensor:", working)
torch.distributed.destroy_process_group()
is_so = failing.keys() == VIEWS.keys() and all("version_counter" in e for e in failing.values())
sys.exit(0 if is_so and not any(working) else 1)
PYTHON
