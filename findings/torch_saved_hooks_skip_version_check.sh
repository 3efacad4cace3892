#!/usr/bin/env bash
# Under torch's saved_tensors_hooks, changing a tensor that backward needs is no error any more.
#
# Autograd notes the version of every tensor that it keeps, and backward raises an error where the
# tensor was changed in place since. Seen in torch 2.13.0: with hooks that hand every tensor through
# as it is, the same code raises nothing, and the gradient is computed from the changed numbers:
# wrong, in silence. Whoever uses such hooks (offloading, compression, recomputing) must compare
# `_version` of what is packed and unpacked.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from contextlib import nullcontext

import torch

print("torch", torch.__version__)


def gradient(context):
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    with context:
        y = x.exp()  # keeps its result for backward
        y.add_(1)
    (found,) = torch.autograd.grad(y.sum(), x)
    return found


try:
    gradient(nullcontext())
    raises = False
except RuntimeError as error:
    raises = "modified by an inplace operation" in str(error)
print("without hooks: an error" if raises else "without hooks: no error")
hooked = gradient(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
right = torch.tensor([0.0, 1.0]).exp()
print("with hooks:", hooked.tolist(), "instead of", right.tolist())
sys.exit(0 if raises and torch.allclose(hooked, right + 1) else 1)
PYTHON
