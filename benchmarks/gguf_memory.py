"""Training from a GGUF file as it lies: memory and rate beside dequantised weights and PEFT.

python -m benchmarks.gguf_memory --json F [--shapes 0.36B,1.1B] [--types q8_0,q4_k]
    [--arms gguf,dequantised,peft] [--tokens 512] [--steps 3]

Models of random numbers, LoRA of rank 4 on every projection of every layer, one row of `--tokens`
tokens a step. Each arm is a process of its own with one epoch of its own rows. `peak_bytes` is
VmHWM, in which the pages of a mapped file count, `private_bytes` the most that was the process's
own. The rate leaves out the first step. PEFT is a plain loop: bfloat16 weights, its own forward,
fused AdamW. A Q4_K file has random blocks, and Q6_K for the embedding, as llama.cpp writes it.
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
from benchmarks.random_model import SHAPES, VOCABULARY, write_model
from swlora.deploy.export_request import TypeName

ARMS = ("gguf", "dequantised", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and rate of training from a GGUF file.")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--shapes", default="0.36B,1.1B")
    parser.add_argument("--types", default="q8_0,q4_k")
    parser.add_argument("--arms", default=",".join(ARMS))
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
        shapes = {shape: {**of, "ratios": ratios(of)} for shape, of in found.items()}
        write_json(args.json, {**about, "shapes": shapes})


def measured(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write a model of the shape in both forms, and run every arm once, one after the other."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder, file = Path(scratch) / "base", Path(scratch) / "base.gguf"
        write_model(folder, SHAPES[shape])
        write_file(folder, file, "q8_0")
        files = {"q8_0": file, "q4_k": file.with_name("base.Q4_K.gguf")}
        types, arms = args.types.split(","), args.arms.split(",")
        if "q4_k" in types:
            write_q4_k(file, files["q4_k"])
        models = {f"{arm} {kind}": files[kind] for arm in arms if arm != "peft" for kind in types}
        models |= {"peft": folder} if "peft" in arms else {}
        found: dict[str, Any] = {kind: {"file_bytes": files[kind].stat().st_size} for kind in types}
        for arm, model in models.items():
            command = [sys.executable, "-m", "benchmarks.gguf_memory", "--arm", arm.split()[0]]
            command += ["--model", str(model), "--tokens", str(args.tokens)]
            command += ["--steps", str(args.steps), "--scratch", scratch]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[arm] = json.loads(done.stdout.splitlines()[-1])
            print(shape, arm, found[arm], flush=True)
    return found


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return what training from each type of file takes, over that of the other arms that ran."""
    result = {}
    for kind in (name.removeprefix("gguf ") for name in found if name.startswith("gguf ")):
        kept, size = found[f"gguf {kind}"], found[kind]["file_bytes"]
        for what in ("peak", "private"):
            result[f"{kind}: {what} : size of the file"] = kept[f"{what}_bytes"] / size
        for other in (f"dequantised {kind}", "peft"):
            if other not in found:
                continue
            for what in ("peak", "private"):
                ratio = kept[f"{what}_bytes"] / found[other][f"{what}_bytes"]
                result[f"{kind}: {what} : that of {other}"] = ratio
            result[f"{kind}: rate : that of {other}"] = found[other]["step_s"] / kept["step_s"]
    return result


def write_q4_k(source: Path, target: Path) -> None:
    """Write a Q8_0 file anew with random Q4_K blocks, and Q6_K ones for the embedding."""
    import gguf
    import numpy as np

    reader, kinds = gguf.GGUFReader(source), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    rng = np.random.default_rng(0)
    for tensor in reader.tensors:
        if tensor.tensor_type != kinds.Q8_0:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        kind = kinds.Q6_K if tensor.name == "token_embd.weight" else kinds.Q4_K
        n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_in, n_out = (int(n) for n in tensor.shape)
        blocks = rng.integers(0, 256, (n_out * n_in // n_values, n_bytes), dtype=np.uint8)
        d = np.float16(1e-4 if kind == kinds.Q4_K else 2e-5)
        scales = [d, np.float16(7.5 * d)] if kind == kinds.Q4_K else [d]
        raw = np.array(scales, dtype=np.float16).view(np.uint8)
        start = 0 if kind == kinds.Q4_K else n_bytes - 2
        blocks[:, start : start + len(raw)] = raw
        writer.add_tensor(tensor.name, blocks.reshape(n_out, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_file(folder: Path, target: Path, kind: TypeName) -> None:
    """Write the model in a folder as a file of the type."""
    from transformers import AutoConfig, AutoTokenizer

    from swlora.deploy.gguf_write import ModelParts, write_gguf
    from swlora.models.weight_source import open_weights
    from swlora.progress import Silent

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with Silent().task("write") as task:
        parts = ModelParts(config, tokenizer, open_weights(folder))
        write_gguf(parts, target, kind, "benchmark", task)


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    private = measure.PrivatePeak()
    step_s = run_peft(args) if args.arm == "peft" else run_ours(args)
    return {
        "step_s": median(step_s[1:]),
        "peak_bytes": measure.status_bytes("VmHWM"),
        "private_bytes": private.stop(),
    }


def write_rows(path: Path, n_rows: int, n_tokens: int) -> None:
    """Write rows of so many tokens, of words at random."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runner.builtin_model())
    words = [f" {a}{b}" for a in "bcdfgklmnprst" for b in ("an", "el", "is", "or", "un")]
    draw = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(n_rows):
            picked = torch.randint(len(words), (n_tokens,), generator=draw).tolist()
            token_ids = tokenizer("".join(words[k] for k in picked)).input_ids
            text = tokenizer.decode(token_ids[: n_tokens - 4])
            file.write(json.dumps({"prompt": "Words:", "completion": text}) + "\n")


def run_ours(args: argparse.Namespace) -> list[float]:
    """Return the seconds of every step of a training; its rows share nothing."""
    import swlora

    rows = args.scratch / "rows.jsonl"
    write_rows(rows, args.steps, args.tokens)
    output = args.scratch / f"run-{args.arm}-{args.model.stem}"
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
