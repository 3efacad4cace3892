#!/usr/bin/env bash
# transformers makes the table of a GGUF file's tensor names once for every module of the model.
#
# To find which tensor of a file is which weight, transformers 5.23.0 (gguf 0.19.0, torch 2.13.0)
# goes down the tree of modules and asks gguf for the names of all tensors of all layers at each one,
# so this work grows with the square of the number of layers. The file itself is taken apart again
# for the configuration and for the weights (and for the tokenizer, which is not loaded here), where
# each entry of a vocabulary becomes objects of its own. Of a 135 M model in Q8_0, 14 of 27 CPU
# seconds of loading went into making the same tables and readers again.
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 gguf==0.19.0 torch==2.13.0 \
  accelerate==1.15.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version

import gguf
import torch
from gguf.gguf_reader import GGUFReader
from gguf.tensor_mapping import TensorNameMap
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
print(*(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")))
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
torch.manual_seed(0)


def write(n_layers):
    config = LlamaConfig(**sizes, num_hidden_layers=n_layers, max_position_embeddings=512)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(f"{folder}/{n_layers}.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(n_layers)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_context_length(512)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(256)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_layers)
    for key, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(key, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(1 for _ in model.modules())


def count(kind):
    begin, made = kind.__init__, []

    def counted(self, *args, **settings):
        made.append(kind)
        begin(self, *args, **settings)

    kind.__init__ = counted
    return made


modules = {n: write(n) for n in (2, 4)}
tables, readers, found = count(TensorNameMap), count(GGUFReader), {}
for n_layers, n_modules in modules.items():
    tables.clear(), readers.clear()
    AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{n_layers}.gguf")
    found[n_layers] = len(tables), len(readers)
    print(
        f"{n_layers} layers, {n_modules} modules: {len(tables)} tables of names, "
        f"{len(readers)} readers"
    )
sys.exit(0 if all(found[n] == (modules[n], 2) for n in modules) else 1)
PYTHON
