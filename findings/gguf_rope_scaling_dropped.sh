#!/usr/bin/env bash
# transformers reads a GGUF file with scaled rotary positions as a model without the scaling.
#
# llama.cpp writes the scaling of long-context models into `ARCH.rope.scaling.*` (linear, yarn) or
# into a tensor of factors, `rope_freqs.weight` (Llama 3.1 and later). Seen in transformers 5.23.0
# (gguf 0.19.0, torch 2.13.0): for "llama" and the other architectures but gpt-oss neither is read.
# The model loads without a warning about it, every weight in its place, and computes other
# positions: its logits differ from those of the model that the file was made of.
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
print(*(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")))
torch.manual_seed(0)
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
plain = {"rope_type": "default", "rope_theta": 10000.0}
model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=scaled)).eval()
unscaled = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=plain)).eval()
unscaled.load_state_dict(model.state_dict())

writer = gguf.GGUFWriter(f"{folder}/scaled.gguf", "llama")
writer.add_block_count(2)
writer.add_embedding_length(64)
writer.add_feed_forward_length(96)
writer.add_context_length(512)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_vocab_size(256)
writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
writer.add_rope_dimension_count(32)
writer.add_rope_freq_base(10000.0)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(4.0)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
for name, tensor in model.state_dict().items():
    if "q_proj" in name or "k_proj" in name:  # llama.cpp has a head's halves in pairs
        tensor = tensor.reshape(2, 2, 16, 64).swapaxes(1, 2).reshape(64, 64)
    writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

read = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file="scaled.gguf", dtype=torch.float32
).eval()
print("rope_parameters of the file as read:", read.config.rope_parameters)
ids = torch.arange(1, 100)[None]
with torch.no_grad():
    of_scaled, of_unscaled, of_read = (m(ids).logits for m in (model, unscaled, read))
far, near = (float((of_read - other).abs().max()) for other in (of_scaled, of_unscaled))
print(f"largest difference of logits to the model: {far:.2g}, to it without scaling: {near:.2g}")
sys.exit(0 if near < 1e-3 < 0.1 < far else 1)
PYTHON
