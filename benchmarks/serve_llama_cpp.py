"""The server against llama.cpp with the same weights: one stream, and eight at once.

    python -m benchmarks.serve_llama_cpp [--rounds N] [--shapes builtin,0.36B] --json F

`swlora serve` and node-llama-cpp (SWLORA_LLAMA_CPP; its built binaries and its defaults) in turns,
each in a process of its own with as many threads as there are cores (ours takes fewer beside other
programs): bfloat16 weights, written to GGUF by our own export, the same prompts as token ids,
greedy. Ours is asked over loopback, llama.cpp in its process. `tokens_per_s` counts the tokens
behind each stream's first one, from the first token (at once: of any stream) to the last;
`first_token_s` is the median wait for it. "long" prompts are 1,000 tokens of random words.
`read_bytes_per_s` is how fast this machine reads memory: a token reads every weight once.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import torch

from benchmarks import cases, runner
from benchmarks.gguf_memory import write_file
from benchmarks.random_model import SHAPES, write_model
from benchmarks.serve import PROMPTS, serving, stream

SCRIPT = Path(__file__).with_suffix(".mjs")
LONG_TOKENS = 1000
WORDS = [f" {a}{b}" for a in "bcdfgklmnprst" for b in ("an", "el", "is", "or", "un")]
ARMS = ("ours", "llama-cpp")
KINDS = ("short", "long")  # of prompts
MODES = ("alone", "together")  # one stream after another, all at once
Streams = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description="The server against llama.cpp.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--shapes", default="builtin", help=f"of builtin, {', '.join(SHAPES)}")
    parser.add_argument("--prompts", default="short,long", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every stream")
    args = parser.parse_args()
    shapes = cases.named(args.shapes, ["builtin", *SHAPES], "shape")
    kinds = cases.named(args.prompts, KINDS, "kind of prompts")

    start, models = runner.load(), {}
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
            folder, file = prepared(shape, Path(scratch))
            found = {kind: measured(folder, file, kind, args.rounds, args.tokens) for kind in kinds}
            models[shape] = {"file_bytes": file.stat().st_size, **found}
    report = {
        "benchmark": "serve against llama.cpp",
        "machine": runner.machine(),
        "load_average": {"start": start, "end": runner.load()},
        "threads": n_threads(),
        "tokens": args.tokens,
        "read_bytes_per_s": read_bytes_per_s(),
        "models": models,
    }
    from swlora.files import write_json

    write_json(args.json, report)
    for shape, by_kind in models.items():
        for kind in kinds:
            print(f"{shape}, {kind} prompts: {json.dumps(by_kind[kind]['ratios'])}")


def n_threads() -> int:
    return len(os.sched_getaffinity(0))


def prepared(shape: str, scratch: Path) -> tuple[str, Path]:
    """Return a model's folder and its bfloat16 GGUF file."""
    file, folder = scratch / "model.gguf", runner.builtin_model()
    if shape != "builtin":
        folder = str(scratch / "model")
        write_model(Path(folder), SHAPES[shape])
    write_file(Path(folder), file, "bf16")
    return folder, file


def measured(folder: str, file: Path, kind: str, n_rounds: int, n_tokens: int) -> dict[str, Any]:
    """Measure both arms in turns; return every round, medians and ratios."""
    prompts = token_prompts(folder, kind)
    rounds: list[dict[str, Any]] = []
    for number in range(n_rounds):
        rounds.append({})
        for arm in ARMS:
            model, of_arm = (folder, of_ours) if arm == "ours" else (str(file), of_llama_cpp)
            streams = of_arm(model, prompts, n_tokens)
            found = {mode: rates(mode, streams[mode]) for mode in MODES}
            rounds[-1][arm] = found
            said = ", ".join(f"{mode} {found[mode]['tokens_per_s']:.1f} tokens/s" for mode in MODES)
            print(f"round {number + 1}/{n_rounds}  {kind}, {arm}: {said}", file=sys.stderr)
    ratios = {
        name: statistics.median(
            one["ours"][name]["tokens_per_s"] / one["llama-cpp"][name]["tokens_per_s"]
            for one in rounds
        )
        for name in MODES
    }
    return {"prompt_tokens": [len(p) for p in prompts], "ratios": ratios, "rounds": rounds}


def rates(mode: str, streams: Streams) -> dict[str, float]:
    """Summarise streams that ran one after another (alone) or at once (together)."""
    first, last = ([one[what] for one in streams] for what in ("first_token_s", "last_token_s"))
    n_after = sum(one["tokens"] - 1 for one in streams)
    took_s = sum(last) - sum(first) if mode == "alone" else max(last) - min(first)
    return {
        "tokens": sum(one["tokens"] for one in streams),
        "tokens_per_s": n_after / took_s,
        "first_token_s": statistics.median(first),
        "seconds": sum(last) if mode == "alone" else max(last),
    }


def token_prompts(folder: str, kind: str) -> list[list[int]]:
    """Return the prompts as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "short":
        return [tokenizer(prompt).input_ids for prompt in PROMPTS]
    draw = random.Random(0)
    texts = ["".join(draw.choices(WORDS, k=LONG_TOKENS)) for _ in PROMPTS]
    return [tokenizer(text).input_ids[:LONG_TOKENS] for text in texts]


def of_ours(folder: str, prompts: Sequence[list[int]], n_tokens: int) -> dict[str, Streams]:
    """Measure a server of ours."""
    with (
        serving(folder) as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=600) as client,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        name = client.get("/v1/models").json()["data"][0]["id"]

        def ask(prompt: list[int]) -> dict[str, float]:
            return stream(client, name, prompt, n_tokens)

        list(pool.map(ask, prompts))  # kernels are made once for every number of rows and tokens
        ask(prompts[0])
        return {"alone": list(map(ask, prompts)), "together": list(pool.map(ask, prompts))}


def of_llama_cpp(file: str, prompts: Sequence[list[int]], n_tokens: int) -> dict[str, Streams]:
    """Measure llama.cpp on a GGUF file."""
    from swlora.deploy.llama_cpp import INSTALL, find_llama_cpp

    llama_cpp = find_llama_cpp()
    if llama_cpp is None:
        raise SystemExit(f"llama.cpp is missing: {INSTALL}, then set SWLORA_LLAMA_CPP")
    request = {
        "package": (llama_cpp.package / "dist" / "index.js").as_uri(),
        "model": file,
        "prompts": prompts,
        "n_new": n_tokens,
        "threads": n_threads(),
    }
    done = subprocess.run(
        [str(llama_cpp.node), str(SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"llama.cpp failed: {done.stderr.strip()[-400:]}")
    answer: dict[str, Streams] = json.loads(done.stdout.splitlines()[-1])
    return answer


def read_bytes_per_s(n_bytes: int = 1 << 30) -> float:
    """Return the best rate of five at which all cores together sum up a block of memory."""
    block = torch.ones(n_bytes // 4)
    seconds = []
    for _ in range(5):
        start_s = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start_s)
    return n_bytes / min(seconds)


if __name__ == "__main__":
    main()
