#!/usr/bin/env bash
# torch 2.11 to 2.13: flex_attention cannot be compiled for any length where score_mod uses a float.
#
# `torch.compile(flex_attention, dynamic=True)` is what one writes so that new lengths are not compiled
# anew. A score_mod that closes over a Python float (a soft cap, a slope) then fails to compile:
# "LoweringException: RuntimeError: unbacked_bindings". Dynamo makes such floats inputs of the compiled
# code, as 0-d tensors whose value is read inside, and the lowering of flex_attention takes no such
# read. With dynamic=False it works, since the float is a constant there; with
# `torch._dynamo.config.specialize_float = True` it works with dynamic=True too.
#
# Seen on a CPU, in inference, with torch 2.11.0 and 2.13.0 (this script). Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
venv/bin/python - <<'EOF'
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

print("torch", torch.__version__)
softcap = 3.0


def with_softcap(softcap):
    def capped(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return capped


def causal(batch, head, query, key):
    return key <= query


q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
mask = create_block_mask(causal, None, None, 256, 256, device="cpu")
scores = 3.0 * torch.tanh(q @ k.transpose(2, 3) * 0.25 / 3.0)
hidden = ~torch.ones(256, 256, dtype=torch.bool).tril()
expected = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v


def outcome(dynamic, specialize_float):
    torch._dynamo.reset()
    torch._dynamo.config.specialize_float = specialize_float
    compiled = torch.compile(flex_attention, dynamic=dynamic)
    try:
        with torch.no_grad():
            out = compiled(q, k, v, score_mod=with_softcap(3.0), block_mask=mask, scale=0.25)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    torch.testing.assert_close(out, expected)
    return "right"


found = {(d, s): outcome(d, s) for d in (False, True) for s in (False, True)}
for (dynamic, specialize), text in found.items():
    print(f"dynamic={dynamic} specialize_float={specialize}: {text}")
assert [k for k, text in found.items() if text != "right"] == [(True, False)], "it has changed"
assert "unbacked_bindings" in found[True, False], "the message has changed"
EOF
