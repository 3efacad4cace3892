#!/usr/bin/env bash
# zentorch's product of plain tensors overwrites the second one and remembers it.
#
# Seen in zentorch 2.13.0.2 (ZenDNN 6.1.0) with torch 2.13.0, in float32 and bfloat16: after
# `zentorch_linear_unary(x, w)` or `zentorch_mm(x, w.t())` the numbers in w stand in the order that
# its kernels read, so every other reader of w computes something else. When new numbers are written
# into w, later products read them as if they stood in that order: wrong, in silence. With
# ZENDNNL_MATMUL_WEIGHT_CACHE=0 both end; with 1 w stays, but later products use a copy of what w
# held at first. Training hands such products tensors that change or die, so it needs 0, or weights
# that `zentorch_weight_prepack_for_linear` has copied, with `is_weight_prepacked=True`.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 zentorch==2.13.0.2
cat > "$folder/product.py" <<'PYTHON'
import sys

import torch
import zentorch

torch.manual_seed(0)
x, w = torch.randn(64, 128), torch.randn(256, 128)
before, right = w.clone(), x @ w.t()
product = torch.ops.zentorch.zentorch_linear_unary
first_is_right = torch.allclose(product(x, w), right, atol=1e-3)
is_unchanged = torch.equal(w, before)
w.copy_(torch.randn(256, 128))
second_is_right = torch.allclose(x @ w.t(), product(x, w), atol=1e-3)
print("torch", torch.__version__, "zentorch", zentorch.__version__)
print("first product right:", first_is_right, "| weight unchanged:", is_unchanged)
print("product after new numbers were written right:", second_is_right)
expected = sys.argv[1] == "right"
sys.exit(0 if [first_is_right, is_unchanged, second_is_right] == [True, expected, expected] else 1)
PYTHON
python="$folder/venv/bin/python"
echo "as it comes"
"$python" "$folder/product.py" wrong
echo "ZENDNNL_MATMUL_WEIGHT_CACHE=0"
ZENDNNL_MATMUL_WEIGHT_CACHE=0 "$python" "$folder/product.py" right
