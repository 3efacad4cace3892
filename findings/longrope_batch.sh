#!/usr/bin/env bash
# LongRoPE in transformers: the factors of a whole batch are chosen by its largest position.
#
# A model with `rope_type` "longrope" has short factors, for texts up to
# `original_max_position_embeddings`, and long ones for texts beyond it. Seen in transformers 5.23.0
# (torch 2.13.0): the choice is made once for a call, from the maximum of all `position_ids`. So a
# text of 14 tokens has other logits in a batch with a text of 58 than it has alone, even with
# padding behind it that its tokens cannot see; its position ids beyond its own end are enough.
# A text's own logits thus depend on its company, in training, evaluation and generation.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=264,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    original_max_position_embeddings=32,
    pad_token_id=0,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 20.0, 40.0],
    },
    initializer_range=0.2,
)
model = Phi3ForCausalLM(config).eval()


def logits(*lengths: int) -> torch.Tensor:
    """The logits of the first text, in a right-padded batch with others."""
    width = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.arange(1, n + 1)
        mask[row, :n] = 1
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[0, : lengths[0]]


alone = logits(14)
beside_short = float((logits(14, 32) - alone).abs().max())
beside_long = float((logits(14, 58) - alone).abs().max())
print(f"largest logit of 14 tokens: {float(alone.abs().max()):.3f}")
print(f"they change by {beside_short:.1e} beside 32 tokens, by {beside_long:.1e} beside 58")
sys.exit(0 if beside_short < 1e-4 < 1e-2 < beside_long else 1)
PYTHON
