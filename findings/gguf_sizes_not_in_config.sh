#!/usr/bin/env bash
# transformers reads a GGUF file's sizes through a table, and some sizes are not in it.
#
# Seen in transformers 5.23.0 (gguf 0.19.0, torch 2.13.0), for files that llama.cpp's converter would
# write of valid models:
# - Qwen3: `attention.key_length` is not in the table, so `head_dim` stays at the class's default of
#   128 whatever the file says (for Qwen3 with experts it is read).
# - GPT-2: `context_length` becomes `n_ctx` and `feed_forward_length` an attribute of that name, which
#   the model reads neither of; `n_positions` stays 1024 and `n_inner` None, that is 4 * n_embd.
# Nothing is said. The weights of such a file then do not fit the model that the configuration makes.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 gguf==0.19.0 torch==2.13.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version

import gguf
import numpy as np
from transformers import AutoConfig

folder = sys.argv[1]
print(*(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")))


def config_of(architecture, **sizes):
    """The configuration that transformers reads from a file with these sizes."""
    path = f"{folder}/{architecture}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((256, sizes["embedding_length"]), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoConfig.from_pretrained(folder, gguf_file=f"{architecture}.gguf")


sizes = {"block_count": 2, "embedding_length": 64, "head_count": 4, "context_length": 512}
sizes |= {"feed_forward_length": 96, "vocab_size": 256}
qwen3 = config_of("qwen3", head_count_kv=2, key_length=32, value_length=32, **sizes)
print(f"Qwen3: the file's heads have 32 values, the configuration's {qwen3.head_dim}")
gpt2 = config_of("gpt2", **sizes)
print(f"GPT-2: inner size 96 in the file, {gpt2.n_inner} in the configuration")
print(f"GPT-2: 512 positions in the file, {gpt2.n_positions} in the configuration")
sys.exit(0 if (qwen3.head_dim, gpt2.n_inner, gpt2.n_positions) == (128, None, 1024) else 1)
PYTHON
