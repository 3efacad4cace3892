"""What `swlora train --dry-run` foresees of memory and time, beside what the training then takes.

    python -m benchmarks.estimates --json F [--add] [--only a,b] [--scratch FOLDER]
    python -m benchmarks.estimates --table F       # the Markdown table of a result

Ten configurations: the embedded model and random weights in the 0.36 B shape, all layers, the last
four and one, four methods, rows of about 60 tokens (E2E's) and of 500 and 2,000 (made ones), and
weights in a .gguf file. Each is two processes with an empty cache, the dry run and the training,
which takes about half a minute on two cores. `--only` names some, `--add` keeps the others that the
file has. Memory is the peak of the whole process, time that of the loop: all steps and the held-out
losses between them.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cases, runner
from benchmarks.gguf_memory import write_file
from benchmarks.random_model import SHAPES, write_model
from benchmarks.rows import find_e2e
from benchmarks.scenario_data import FIRST_UNIQUE, Writer

MEMORY_AIM, TIME_AIM = 0.15, 0.20
HEADER = ("configuration", "memory foreseen, GB", "used, GB", "error",
          "time foreseen, s", "used, s", "error", "probed steps")  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """A training: its model ("builtin", or a shape with or without .gguf), rows and flags."""

    name: str
    model: str
    tokens: int
    n_rows: int
    flags: str

    def arguments(self, scratch: Path) -> list[str]:
        """Return the arguments of `swlora train`."""
        model, data = made_model(self.model, scratch), made_rows(self.tokens, self.n_rows, scratch)
        return ["train", "--model", model, *data, "--epochs", "1", *self.flags.split()]


CONFIGURATIONS = (
    Configuration("all-60", "builtin", 60, 384, "--layers all --batch-size 20"),
    Configuration("last4-60", "builtin", 60, 480, "--layers last:4 --epochs 2 --batch-size 32"),
    Configuration("one-60", "builtin", 60, 640, "--layers 11 --epochs 2 --batch-size 32"),
    Configuration("dora-60", "builtin", 60, 320, "--layers all --method dora --batch-size 16"),
    Configuration(
        "adalora-60", "builtin", 60, 320, "--layers all --method adalora --batch-size 16"
    ),
    Configuration("full-one-60", "builtin", 60, 640, "--layers 11 --method full --batch-size 32"),
    Configuration("all-500", "builtin", 500, 28, "--layers all --batch-size 4"),
    Configuration("all-2000", "builtin", 2000, 5, "--layers all --batch-size 1"),
    Configuration("0.36B-last4-60", "0.36B", 60, 320, "--layers last:4 --batch-size 16"),
    Configuration("0.36B-gguf-500", "0.36B.gguf", 500, 6, "--layers all --batch-size 1"),
)


def made_model(name: str, scratch: Path) -> str:
    """Return the place of a model, which is written where it is not there yet."""
    if name == "builtin":
        return runner.builtin_model()
    shape, folder = name.removesuffix(".gguf"), scratch / name.removesuffix(".gguf")
    if not folder.is_dir():
        write_model(folder, SHAPES[shape])
    if shape == name:
        return str(folder)
    file = scratch / f"{shape}.Q8_0.gguf"
    if not file.is_file():
        write_file(folder, file, "q8_0")
    return str(file)


def made_rows(n_tokens: int, n_rows: int, scratch: Path) -> list[str]:
    """Return the flags that name the rows: E2E's for 60 tokens, else made ones of so many."""
    if n_tokens == 60:
        try:
            return ["--dataset", str(find_e2e(None)), "--train-rows", str(n_rows)]
        except SystemExit as error:
            raise SystemExit(f"rows of 60 tokens are E2E's: {error}") from error
    from transformers import AutoTokenizer

    path = scratch / f"rows-{n_tokens}.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(runner.builtin_model())
    writer = Writer(tokenizer, 0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(n_rows):
            prompt = tokenizer.decode([FIRST_UNIQUE + number, *writer.words(20)])
            answer = tokenizer.decode(writer.words(n_tokens - 22))
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return ["--dataset", str(path), "--eval-every-steps", "0"]


def measured(configuration: Configuration, scratch: Path) -> dict[str, Any]:
    """Return what was foreseen, what was used and the errors, or why it did not run."""
    arguments = configuration.arguments(scratch)
    if configuration.model.endswith(".gguf"):
        arguments += ["--frozen", "gguf"]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        output = ["--output", str(Path(folder) / "run")]
        foreseen = runner.run_module("swlora", [*arguments, *output, "--dry-run"])
        used = runner.run_module("swlora", [*arguments, *output]) if "error" not in foreseen else {}
    if error := foreseen.get("error") or used.get("error") or foreseen.get("refused"):
        return {"error": error}
    memory, time = foreseen["memory"], foreseen["time"]
    peak_bytes, train_s = used["peak_memory_bytes"], used["foreseen"]["used_train_s"]
    return {
        "flags": configuration.flags,
        "foreseen": {"memory": memory, "time": time, "n_steps": foreseen["n_steps"]},
        "foreseen_by_the_run": used["foreseen"],
        "used": {"peak_memory_bytes": peak_bytes, "train_s": train_s, "n_steps": used["steps"]},
        "memory_error": memory["peak_bytes"] / peak_bytes - 1,
        "time_error": time["train_s"] / train_s - 1,
    }


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table, a line a configuration, and how many reach the aims."""
    lines = [HEADER, ("---",) * len(HEADER)]
    found = report["estimates"]
    lines += [_cells(name, case) for name, case in found.items()]
    done = [case for case in found.values() if "error" not in case]
    n_memory = sum(abs(case["memory_error"]) <= MEMORY_AIM for case in done)
    n_time = sum(abs(case["time_error"]) <= TIME_AIM for case in done)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"{text}\n\nmemory within {MEMORY_AIM:.0%}: {n_memory} of {len(found)}; "
        f"time within {TIME_AIM:.0%}: {n_time} of {len(found)}"
    )


def _cells(name: str, case: dict[str, Any]) -> Sequence[str]:
    if "error" in case:
        return (name, case["error"], *[""] * (len(HEADER) - 2))
    memory, time, used = case["foreseen"]["memory"], case["foreseen"]["time"], case["used"]
    return (
        name,
        f"{memory['peak_bytes'] / 1e9:.2f}",
        f"{used['peak_memory_bytes'] / 1e9:.2f}",
        f"{case['memory_error']:+.0%}",
        f"{time['train_s']:.1f}",
        f"{used['train_s']:.1f}",
        f"{case['time_error']:+.0%}",
        str(time["probed_steps"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Foreseen and used: memory and time.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--json", type=Path, help="where the results go")
    where.add_argument("--table", type=Path, help="print the table of these results; run nothing")
    parser.add_argument("--only", help="names of configurations, comma-separated")
    parser.add_argument("--add", action="store_true", help="keep the others that --json has")
    parser.add_argument(
        "--scratch", type=Path, help="folder with 2 GB free, kept for the next time"
    )
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    from swlora.files import write_json

    report = {"benchmark": "estimates", "machine": runner.machine(), "estimates": {}}
    if args.add and args.json.exists():
        report = json.loads(args.json.read_text(encoding="utf-8"))
    known = {configuration.name: configuration for configuration in CONFIGURATIONS}
    names = cases.named(args.only, known, "configuration")
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as temporary:
        scratch = args.scratch or Path(temporary)
        scratch.mkdir(exist_ok=True)
        for name in names:
            report["estimates"][name] = measured(known[name], scratch)
            report["estimates"][name]["load_average"] = runner.load()
            report["estimates"] = {n: v for n in known if (v := report["estimates"].get(n))}
            write_json(args.json, report)  # after each: a long list may be cut off
    print(table(report))


if __name__ == "__main__":
    main()
