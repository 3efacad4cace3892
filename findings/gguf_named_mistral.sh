#!/usr/bin/env bash
# transformers takes a "llama" GGUF file that is named exactly "mistral" for another architecture.
#
# Mistral's models have the architecture "llama" in GGUF. transformers 5.23.0 (gguf 0.19.0, torch
# 2.13.0) looks at `general.name`: where that is the one word "mistral", in small letters, it makes a
# MistralConfig, for which it then knows no names of tensors. The same file under another name loads,
# and gives the logits of the model that it was made of.
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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
print(*(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")))
torch.manual_seed(0)
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
torch.set_grad_enabled(False)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def write(name):
    writer = gguf.GGUFWriter(f"{folder}/{name}.gguf", "llama")
    writer.add_name(name)
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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, tensor in model.state_dict().items():
        if "q_proj" in key or "k_proj" in key:  # llama.cpp has a head's halves in pairs
            tensor = tensor.reshape(2, 2, 16, 64).swapaxes(1, 2).reshape(64, 64)
        writer.add_tensor(names.get_name(key, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ids = torch.arange(20)[None]
expected = model(ids).logits
outcomes = {}
for name in ("Mistral", "mistral"):
    write(name)
    kind = AutoConfig.from_pretrained(folder, gguf_file=f"{name}.gguf").model_type
    try:
        read = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=f"{name}.gguf", dtype=torch.float32
        ).eval()
        difference = float((read(ids).logits - expected).abs().max())
        outcomes[name] = kind, f"logits differ by {difference:.1g}"
    except Exception as error:
        outcomes[name] = kind, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    print(name, *outcomes[name], sep=": ")
is_so = outcomes["Mistral"] == ("llama", "logits differ by 0") and outcomes["mistral"][0] == "mistral"
sys.exit(0 if is_so and not outcomes["mistral"][1].startswith("logits differ by 0") else 1)
PYTHON
