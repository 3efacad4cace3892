"""The server under load: eight clients at once against one after another, and how it answers.

    python -m benchmarks.serve [--rounds N] [--clients N] [--tokens N] --json F

`swlora serve` with the embedded model, in a process of its own, asked for greedy streams over
loopback; then `generate` of transformers for the same prompts, one after another, in another one.
Rates count the tokens that came, over the wall clock from the first request to the last token.
While all clients are served, /health is asked every 20 ms.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import runner

PROMPTS = (
    "The river was quiet that morning, and nobody spoke while",
    "Bread is made of flour, water, salt and yeast. First",
    "When the train finally arrived at the station,",
    "My grandmother kept a garden behind the house, where",
    "In the year that the old bridge was closed, people",
    "A good teacher knows that every child",
    "The first thing to learn about sailing is",
    "On the shelf above the fire stood",
)
HEALTH_EVERY_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description="The server under load.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--clients", type=int, default=8, help="clients at once, 8 at most")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every request")
    args = parser.parse_args()

    start, model = runner.load(), runner.builtin_model()
    prompts = list(PROMPTS[: args.clients])
    rounds = []
    for number in range(args.rounds):
        with serving(model) as url:
            found = served(url, prompts, args.tokens)
        arguments = ["--model", model, "--tokens", str(args.tokens), "--prompts", *prompts]
        found["generate"] = runner.run_module("benchmarks.serve_arm", arguments)
        rounds.append(found)
        print(f"round {number + 1}/{args.rounds}: {show(found)}", file=sys.stderr, flush=True)
    report = {
        "benchmark": "serve",
        "machine": runner.machine(),
        "load_average": {"start": start, "end": runner.load()},
        "clients": len(prompts),
        "tokens": args.tokens,
        "ratios": {
            "together_vs_one_after_another": _median(rounds, "together", "one_by_one"),
            "single_stream_vs_generate": _median(rounds, "one_by_one", "generate"),
        },
        "rounds": rounds,
    }
    from swlora.files import write_json

    write_json(args.json, report)
    print("; ".join(f"{name} {value:.2f}" for name, value in report["ratios"].items()))


@contextmanager
def serving(model: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """Start a server on a free port; yield its address."""
    command = [sys.executable, "-m", "swlora", "serve", "--model", model, "--port", "0", *flags]
    process = subprocess.Popen(
        command, cwd=runner.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start; try: swlora serve --model builtin")
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def served(url: str, prompts: list[str], n_tokens: int) -> dict[str, Any]:
    """Measure one server: one client at a time, all at once, and its health meanwhile."""
    with httpx2.Client(base_url=url, trust_env=False, timeout=300) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]

        def ask(prompt: str) -> dict[str, float]:
            return stream(client, name, prompt, n_tokens)

        for prompt in prompts:  # kernels are made once for every number of rows and tokens
            ask(prompt)
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(ask, prompts))
            one_by_one = _rate([], time.perf_counter(), map(ask, prompts))
            with asking_for_health(url) as latencies_ms:
                together = _rate([], time.perf_counter(), pool.map(ask, prompts))
    return {"one_by_one": one_by_one, "together": together, "health": _latency(latencies_ms)}


def stream(
    client: httpx2.Client, model: str, prompt: str | list[int], n_tokens: int
) -> dict[str, float]:
    """Read one stream; return its tokens and the time until the first and the last of them."""
    body = {"model": model, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    start_s, first_s, last_s, n = time.perf_counter(), 0.0, 0.0, 0
    with client.stream("POST", "/v1/completions", json=body | options) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                last_s = time.perf_counter() - start_s
                first_s = first_s or last_s
                chunk = json.loads(line.removeprefix("data: "))
                if chunk.get("usage"):
                    n = chunk["usage"]["completion_tokens"]
            elif line and line != "data: [DONE]":
                raise SystemExit(f"the server refused or failed: {line[:300]}")
    if not n:
        raise SystemExit("a stream ended without its usage")
    return {"tokens": n, "first_token_s": first_s, "last_token_s": last_s}


@contextmanager
def asking_for_health(url: str) -> Iterator[list[float]]:
    """Ask for /health while the body runs; fill in how long each answer took, in ms."""
    latencies_ms: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=url, trust_env=False) as client:
            while not stop.wait(HEALTH_EVERY_S):
                start_s = time.perf_counter()
                client.get("/health").raise_for_status()
                latencies_ms.append(1000 * (time.perf_counter() - start_s))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield latencies_ms
    finally:
        stop.set()
        thread.join()


def _rate(done: list[dict[str, float]], start_s: float, answers: Any) -> dict[str, float]:
    done += answers
    seconds = time.perf_counter() - start_s
    n_tokens = sum(answer["tokens"] for answer in done)
    return {
        "tokens": n_tokens,
        "seconds": seconds,
        "tokens_per_s": n_tokens / seconds,
        "first_token_s": statistics.median(answer["first_token_s"] for answer in done),
    }


def _latency(latencies_ms: list[float]) -> dict[str, float]:
    ordered = sorted(latencies_ms)
    return {
        "n": len(ordered),
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max_ms": ordered[-1],
    }


def _median(rounds: list[dict[str, Any]], what: str, other: str) -> float:
    return statistics.median(
        one[what]["tokens_per_s"] / one[other]["tokens_per_s"] for one in rounds
    )


def show(found: dict[str, Any]) -> str:
    """Say what a round found, in a line."""
    rates = {
        name: found[name].get("tokens_per_s") for name in ("one_by_one", "together", "generate")
    }
    said = [
        f"{name} {rate:.1f} tokens/s" if rate else f"{name} failed" for name, rate in rates.items()
    ]
    return ", ".join([*said, f"/health p99 {found['health']['p99_ms']:.0f} ms"])


if __name__ == "__main__":
    main()
