"""Peak memory of `swlora merge` against its largest shard: a 1.1 B Llama of random numbers.

python -m benchmarks.merge_memory --json F [--shard-gb 0.8]

The model is written shard by shard, and an adapter of rank 16 on every projection beside it. The
merge is a process of its own, comparison included; its peak is VmHWM, which counts pages of mapped
files too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import runner

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "vocab_size": 49152,  # the tokenizer is that of the embedded model
}
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a merge.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--shard-gb", type=float, default=0.8)
    parser.add_argument("--scratch", type=Path, help="folder with some 6 GB free")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        model = write_model(base, SHAPE, args.shard_gb)
        write_adapter(adapter, model)
        report = merge(base, adapter, Path(scratch) / "merged", args.shard_gb)
    from swlora.files import write_json

    write_json(args.json, {"benchmark": "merge memory", "machine": runner.machine(), **report})
    print(
        f"{report['parameters'] / 1e9:.2f} B weights, largest shard "
        f"{report['largest_shard_bytes'] / 1e9:.2f} GB: peak {report['peak_bytes'] / 1e9:.2f} GB, "
        f"{report['peak_over_largest_shard']:.2f} times; {report['wall_s']:.0f} s"
    )


def write_model(folder: Path, shape: dict[str, Any], shard_gb: float) -> Any:
    """Write a model of random bfloat16 numbers, a shard at a time; return it without content."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir()
    config = AutoConfig.for_model("llama", **shape, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(runner.builtin_model()).save_pretrained(folder)
    torch.manual_seed(0)
    weight_map, shard, n_shards = {}, dict[str, torch.Tensor](), 0
    for name, weight in [*model.named_parameters(), ("", None)]:
        n_bytes = sum(tensor.nbytes for tensor in shard.values())
        if weight is None or n_bytes + 2 * weight.numel() > shard_gb * 1e9:
            n_shards += 1
            file_name = f"model-{n_shards:05}.safetensors"
            save_file(shard, folder / file_name, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file_name)
            shard.clear()
        if weight is not None:
            is_norm = weight.dim() == 1
            values = torch.ones(weight.shape) if is_norm else torch.randn(weight.shape) * 0.02
            shard[name] = values.bfloat16()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def write_adapter(folder: Path, model: Any) -> None:
    from peft import LoraConfig

    projections = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    targets = sorted({name.rpartition(".")[2] for name in projections})
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {}
    for name, module in projections.items():
        n_out, n_in = module.weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, n_in) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_out, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")


def merge(base: Path, adapter: Path, output: Path, shard_gb: float) -> dict[str, Any]:
    """Run the command; return what it took, and what its report says."""
    report = output.parent / "report.json"
    command = [sys.executable, "-m", "swlora", "merge", "--adapter", str(adapter)]
    command += ["--model", str(base), "--output", str(output), "--shard-gb", str(shard_gb)]
    start_s = time.perf_counter()
    subprocess.run([*command, "--json", str(report)], check=True)
    wall_s = time.perf_counter() - start_s
    found = json.loads(report.read_text())
    largest = max(path.stat().st_size for path in output.glob("*.safetensors"))
    return {
        "parameters": found["weights_bytes"] // 2,
        "largest_shard_bytes": largest,
        "files": found["files"],
        "peak_bytes": found["peak_memory_bytes"],
        "peak_over_largest_shard": found["peak_memory_bytes"] / largest,
        "wall_s": wall_s,
        "merge_s": found["merge_s"],
        "compare_s": found["compare_s"],
        "agreement": found["agreement"],
    }


if __name__ == "__main__":
    main()
