"""Training from a Q8_0 GGUF file as it lies: memory and rate beside dequantised weights and PEFT.

python -m benchmarks.gguf_memory --json F [--shapes 0.36B,1.1B] [--tokens 512] [--steps 3]

Models of random numbers, LoRA of rank 4 on every projection of every layer, one row of `--tokens`
tokens a step. Each arm is a process of its own with one epoch of its own rows; its peak is VmHWM,
in which the pages of a mapped file count. The rate leaves out the first step. PEFT is a plain loop:
bfloat16 weights, its own forward, fused AdamW.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure, runner
from benchmarks.merge_memory import write_model

SHAPES = {
    "0.36B": {
        **{"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32},
        **{"num_attention_heads": 15, "num_key_value_heads": 5, "tie_word_embeddings": True},
    },
    "1.1B": {
        **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": True},
    },
    "1.7B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True},
    },
}
OURS = ("gguf", "dequantised")
ARMS = (*OURS, "peft")
VOCABULARY, CONTEXT_TOKENS = 49152, 4096  # the tokenizer is that of the embedded model


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and rate of training from a GGUF file.")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--shapes", default="0.36B,1.1B")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder with some 6 GB free")
    parser.add_argument("--arm", choices=ARMS, help="run this one, in this process")
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    found = {shape: measured(shape, args) for shape in args.shapes.split(",")}
    for shape, arms in found.items():
        print(shape, json.dumps(ratios(arms), indent=2))
    if args.json:
        from swlora.files import write_json

        about = {"benchmark": "GGUF memory", "machine": runner.machine()}
        about |= {"tokens": args.tokens, "steps": args.steps}
        shapes = {shape: {**arms, "ratios": ratios(arms)} for shape, arms in found.items()}
        write_json(args.json, {**about, "shapes": shapes})


def measured(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write a model of the shape in both forms, and run every arm once, one after the other."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder, file = Path(scratch) / "base", Path(scratch) / "base.gguf"
        sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT_TOKENS}
        write_model(folder, SHAPES[shape] | sizes, 2.0)
        write_file(folder, file)
        found: dict[str, Any] = {"file_bytes": file.stat().st_size}
        for arm in ARMS:
            model = folder if arm == "peft" else file
            command = [sys.executable, "-m", "benchmarks.gguf_memory", "--arm", arm]
            command += ["--model", str(model), "--tokens", str(args.tokens)]
            command += ["--steps", str(args.steps), "--scratch", scratch]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[arm] = json.loads(done.stdout.splitlines()[-1])
            print(shape, arm, found[arm], flush=True)
    return found


def ratios(found: dict[str, Any]) -> dict[str, float]:
    gguf, dense, peft = (found[arm] for arm in ARMS)
    return {
        "peak : peft's": gguf["peak_bytes"] / peft["peak_bytes"],
        "peak : size of the file": gguf["peak_bytes"] / found["file_bytes"],
        "peak : that of dequantised weights": gguf["peak_bytes"] / dense["peak_bytes"],
        "rate : that of dequantised weights": dense["step_s"] / gguf["step_s"],
        "rate : peft's": peft["step_s"] / gguf["step_s"],
    }


def write_file(folder: Path, target: Path) -> None:
    """Write the model in a folder as a Q8_0 file."""
    from transformers import AutoConfig, AutoTokenizer

    from swlora.deploy.gguf_write import ModelParts, write_gguf
    from swlora.models.weight_source import open_weights
    from swlora.progress import Silent

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with Silent().task("write") as task:
        parts = ModelParts(config, tokenizer, open_weights(folder))
        write_gguf(parts, target, "q8_0", "random numbers", task)


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    step_s = run_peft(args) if args.arm == "peft" else run_ours(args)
    return {"step_s": median(step_s[1:]), "peak_bytes": measure.status_bytes("VmHWM")}


def run_ours(args: argparse.Namespace) -> list[float]:
    """Return the seconds of every step of a training; its rows share nothing."""
    from transformers import AutoTokenizer

    import swlora

    tokenizer = AutoTokenizer.from_pretrained(runner.builtin_model())
    rows = args.scratch / "rows.jsonl"
    words = [f" {a}{b}" for a in "bcdfgklmnprst" for b in ("an", "el", "is", "or", "un")]
    draw = torch.Generator().manual_seed(0)
    with rows.open("w") as file:
        for _ in range(args.steps):
            picked = torch.randint(len(words), (args.tokens,), generator=draw).tolist()
            token_ids = tokenizer("".join(words[k] for k in picked)).input_ids
            text = tokenizer.decode(token_ids[: args.tokens - 4])
            file.write(json.dumps({"prompt": "Words:", "completion": text}) + "\n")
    output = args.scratch / f"run-{args.arm}"
    swlora.train(
        model=str(args.model),
        frozen=args.arm,
        dtype="bfloat16",
        dataset=str(rows),
        eval_file=str(rows),  # not measured
        layers="all",
        batch_size=1,
        row_tokens=args.tokens,
        eval_every_steps=0,
        output=output,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    ends = [0.0, *(line["elapsed_s"] for line in lines)]
    return [after - before for before, after in pairwise(ends)]


def run_peft(args: argparse.Namespace) -> list[float]:
    """Return the seconds of every step of PEFT in a plain loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, fused=True)
    step_s = []
    for _ in range(args.steps):
        token_ids = torch.randint(VOCABULARY, (1, args.tokens))
        start_s = time.perf_counter()
        peft_model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step_s.append(time.perf_counter() - start_s)
    return step_s


if __name__ == "__main__":
    main()
