#!/usr/bin/env bash
# OPT in transformers: packed rows see each other, with use_cache=False and without a mask, too.
#
# Rows that follow one another in one sequence, with position_ids that begin again at 0, are kept
# apart by transformers where no attention mask and no cache is given (`create_causal_mask` is handed
# the positions). Seen in transformers 5.23.0 (torch 2.13.0): OPT does not hand them on, so that a
# row's logits depend on the row before it; Llama's do not.
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
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
sizes = {
    "vocab_size": 264,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def changes(model: torch.nn.Module) -> float:
    """How much the logits of five tokens change when another row is packed before them."""
    row, before = torch.arange(10, 15), torch.arange(20, 27)
    positions = torch.cat([torch.arange(7), torch.arange(5)])
    with torch.no_grad():
        alone = model(input_ids=row[None], use_cache=False).logits[0]
        ids = torch.cat([before, row])[None]
        packed = model(input_ids=ids, position_ids=positions[None], use_cache=False).logits[0, 7:]
    return float((packed - alone).abs().max())


torch.manual_seed(0)
opt = changes(OPTForCausalLM(OPTConfig(ffn_dim=96, word_embed_proj_dim=64, **sizes)).eval())
llama = changes(LlamaForCausalLM(LlamaConfig(intermediate_size=96, **sizes)).eval())
print(f"logits of a packed row change by {opt:.1e} in OPT, by {llama:.1e} in Llama")
sys.exit(0 if llama < 1e-4 < 1e-2 < opt else 1)
PYTHON
