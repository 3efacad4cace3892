#!/usr/bin/env bash
# accelerate: a second Accelerator() takes gradient accumulation away from one that is there.
#
# How many batches are accumulated is kept once for the whole process. An Accelerator that is made
# without naming a number says 1, and that replaces the number of an earlier one: it then steps on
# every batch, and divides no loss any more, without a warning. A program that makes an Accelerator
# inside a function (a helper, an evaluation, another training) so changes its caller's training.
# Seen in accelerate 1.15.0 (torch 2.13.0, on a CPU).
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import accelerate
import torch
from accelerate import Accelerator


def steps_of_eight_batches(accelerator: Accelerator) -> int:
    """How often the weights are due to change in eight batches."""
    layer = accelerator.prepare(torch.nn.Linear(1, 1))
    n = 0
    for _ in range(8):
        with accelerator.accumulate(layer):
            n += accelerator.sync_gradients
    return n


print("accelerate", accelerate.__version__, "torch", torch.__version__)
first = Accelerator(cpu=True, gradient_accumulation_steps=4)
before = first.gradient_accumulation_steps, steps_of_eight_batches(first)
Accelerator(cpu=True)
after = first.gradient_accumulation_steps, steps_of_eight_batches(first)
print(f"the first one accumulates {before[0]} batches and makes {before[1]} steps in eight;")
print(f"after a second Accelerator() it accumulates {after[0]} and makes {after[1]}")
sys.exit(0 if before == (4, 2) and after == (1, 8) else 1)
PYTHON
