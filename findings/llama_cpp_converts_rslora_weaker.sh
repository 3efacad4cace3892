#!/usr/bin/env bash
# llama.cpp's convert_lora_to_gguf.py writes a rank-stabilised adapter sqrt(r) times too weak.
#
# PEFT scales an adapter by lora_alpha / r, or by lora_alpha / sqrt(r) where its config says
# use_rslora, and a module that alpha_pattern names has an alpha of its own. The converter reads
# lora_alpha alone and writes that one number into the file; llama.cpp divides it by the rank that it
# sees in each tensor (get_scale in src/llama-adapter.h). So without a word an rsLoRA adapter of rank
# 16 comes out with a quarter of its strength, and modules of alpha_pattern with the alpha of the
# others. A file is right where alpha is written as lora_alpha * sqrt(r). Seen in the converter of the
# source package llama-cpp-python 0.3.36 (with peft 0.21.2, transformers 5.23.0, torch 2.13.0).
#
# Exits with 0 while this is so, with 1 when it is not any more, and with 2 where the converter fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0 sentencepiece==0.2.1
"$folder/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder" \
  llama-cpp-python==0.3.36
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder" \
  --strip-components=3 llama_cpp_python-0.3.36/vendor/llama.cpp
grep -A 5 'float get_scale' "$folder/src/llama-adapter.h"
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder / "gguf-py"))

import gguf
import peft
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
base = folder / "base"
config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
LlamaForCausalLM(config).save_pretrained(base)


def scales(name: str, **settings: object) -> dict[str, tuple[float, float]]:
    """By module: the scale that PEFT uses, and the one that llama.cpp makes of the file."""
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    layer = model.base_model.model.model.layers[0].self_attn
    used = {"q": layer.q_proj.scaling["default"], "v": layer.v_proj.scaling["default"]}
    model.save_pretrained(folder / name)
    script, file = folder / "convert_lora_to_gguf.py", folder / f"{name}.gguf"
    line = [sys.executable, script, "--base", base, "--outfile", file, folder / name]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr)
        sys.exit(2)
    if "warning" in done.stderr.lower():
        print("the converter warned:", done.stderr)
        sys.exit(1)
    found = gguf.GGUFReader(file)
    alpha = float(found.get_field("adapter.lora.alpha").contents())
    ranks = {t.name: int(t.shape[-1]) for t in found.tensors if t.name.endswith("lora_a")}
    made = {part: alpha / ranks[f"blk.0.attn_{part}.weight.lora_a"] for part in used}
    print(f"{name:14s}", {p: f"PEFT {used[p]:g}, llama.cpp {made[p]:g}" for p in used})
    return {part: (used[part], made[part]) for part in used}


plain = scales("plain")
stabilised = scales("stabilised", use_rslora=True)
own = scales("own alpha", alpha_pattern={"v_proj": 64})
is_so = (
    plain == {"q": (1.0, 1.0), "v": (1.0, 1.0)}
    and stabilised == {"q": (4.0, 1.0), "v": (4.0, 1.0)}
    and own == {"q": (1.0, 1.0), "v": (4.0, 1.0)}
)
sys.exit(0 if is_so else 1)
PYTHON
