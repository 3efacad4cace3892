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
from benchmarks.random_model import SHAPES, write_model

SHAPE = SHAPES["1.1B"] | {"tie_word_embeddings": False}
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a merge.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--shard-gb", type=float, default=0.8)
    parser.add_argument("--scratch", type=Path, help="folder with some 6 GB free")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        model = write_model(base, SHAPE, shard_gb=args.shard_gb)
        write_adapter(adapter, model)
        report = merge(base, adapter, Path(scratch) / "merged", args.shard_gb)
    from swlora.files import write_json

    write_json(args.json, {"benchmark": "merge memory", "machine": runner.machine(), **report})
    print(
        f"{report['parameters'] / 1e9:.2f} B weights, largest shard "
        f"{report['largest_shard_bytes'] / 1e9:.2f} GB: peak {report['peak_bytes'] / 1e9:.2f} GB, "
        f"{report['peak_over_largest_shard']:.2f} times; {report['wall_s']:.0f} s"
    )


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
