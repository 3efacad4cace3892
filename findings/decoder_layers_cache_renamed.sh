#!/usr/bin/env bash
# transformers 5.24 hands its decoder layers their cache as `cache`; up to 5.23 it was `past_key_values`.
#
# The model's own forward still takes past_key_values. What wraps, hooks or replaces a layer and reads
# the cache there by its old name finds none after that minor version, and nothing fails: it goes on
# as if there were no cache. Seen in Llama and Qwen 2 of transformers 5.23.0 and 5.24.0 (torch 2.13.0).
#
# Exits with 0 while this is so, and with 1 when it is not any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/names.py" <<'PYTHON'
"""Print by which names the first decoder layer is given a cache."""

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

sizes = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
}


def cache_names(model: torch.nn.Module, layer: torch.nn.Module) -> list[str]:
    """Return the keywords of the layer whose value is a cache."""
    seen: dict[str, object] = {}
    layer.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(5)[None], use_cache=True)
    return sorted(name for name, value in seen.items() if isinstance(value, transformers.Cache))


llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
qwen = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
found = [cache_names(model, model.model.layers[0]) for model in (llama, qwen)]
print("transformers", transformers.__version__, "Llama", *found[0], "Qwen2", *found[1])
PYTHON
said=""
for version in 5.23.0 5.24.0; do
  "$folder/venv/bin/pip" install --quiet "transformers==$version" torch==2.13.0
  said+="$("$folder/venv/bin/python" "$folder/names.py")"$'\n'
done
printf '%s' "$said"
[ "$said" = "transformers 5.23.0 Llama past_key_values Qwen2 past_key_values
transformers 5.24.0 Llama cache Qwen2 cache
" ]
