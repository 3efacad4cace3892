"""Training of larger models: rate, memory and share of the peak, beside PEFT and Unsloth.

    python -m benchmarks.sizes [--quick] --json F [--shapes a,b] [--layers a,b] [--rows a,b]
                               [--arms a,b] [--rounds N]
    python -m benchmarks.sizes --table F       # the Markdown table of a result

Models of random bfloat16 numbers in the shapes of 0.36 B, 1.1 B and 1.7 B, LoRA in all layers and
in the last four, rows of about 60 tokens (E2E, where it is there) and of 512 tokens with nothing
shared; how arms are run is in `cases.py`. A quick run is one short round of 1.1 B, or of the
shapes that are named, 15 minutes a shape at most on two idle cores.

share of peak = FLOPs that the rows need in our trees (`measure.py`) / seconds / FLOP/s of the best
2048^3 product in the arm's process. Rows of peers have no trees, but need no more.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cases, scenario_report
from benchmarks.arms import SCENARIO_ARMS
from benchmarks.random_model import SHAPES, write_model
from benchmarks.scenario_data import Writer, unshared
from benchmarks.scenario_report import Summary, memory_cell, notes, number, rate, rate_cell
from benchmarks.token_rows import TokenRows

QUICK_LIMIT_S = 890.0  # a shape
QUICK_SHAPES = "1.1B"
QUICK_STEPS_OF_OURS = 3  # with few layers, the first computes the states of several
ARMS = "ours,peft,unsloth"
LAYERS = ("all", "last:4")
HEADER = ("model", "layers", "tokens a row", "arm", "examples/s", "tokens/s", "memory, GB",
          "share of bf16 peak", "swlora's rate : its", "swlora's memory : its")  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Rows of one length: how many a step takes, of ours and of peers, and the steps timed."""

    tokens: int
    ours_batch: int
    peer_batch: int
    quick_steps: int
    full_steps: int = 6

    def amount(self, arm: str, quick: bool) -> tuple[int, int]:
        """Return (rows a step, rows that are timed) of an arm."""
        is_ours = SCENARIO_ARMS[arm].kind == "ours"
        batch = self.ours_batch if is_ours else self.peer_batch
        quick_steps = max(QUICK_STEPS_OF_OURS, self.quick_steps) if is_ours else self.quick_steps
        return batch, batch * (quick_steps if quick else self.full_steps)

    def made(self, tokenizer: Any) -> TokenRows:
        """Return rows of exactly so many tokens, nothing shared."""
        n = self.ours_batch * (1 + self.full_steps)
        return TokenRows.from_parts(unshared(self.tokens)(n, Writer(tokenizer, 0)))


ROWS = {"60": Rows(60, 32, 16, 2), "512": Rows(512, 2, 2, 1)}


def main() -> None:
    parser = cases.parser("Training of larger models.", "15 minutes a shape at most")
    parser.add_argument(
        "--shapes", help=f"comma-separated, of: {', '.join(SHAPES)} (quick: {QUICK_SHAPES})"
    )
    parser.add_argument("--layers", help=f"comma-separated, of: {', '.join(LAYERS)}")
    parser.add_argument("--rows", help=f"tokens a row, comma-separated, of: {', '.join(ROWS)}")
    parser.add_argument("--scratch", type=Path, help="folder with some 6 GB free")
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    shapes = cases.named(args.shapes or (QUICK_SHAPES if args.quick else None), SHAPES, "shape")
    layers = cases.named(args.layers, LAYERS, "choice of layers")
    rows = cases.named(args.rows, ROWS, "kind of rows")
    arms = cases.named(args.arms or ARMS, SCENARIO_ARMS, "arm")
    cases.find_unsloth(args)
    with tempfile.TemporaryDirectory(prefix="swlora-bench-", dir=args.scratch) as scratch:
        made = [
            case
            for shape in shapes
            for case in cases_of(shape, layers, rows, arms, Path(scratch), args)
        ]
        report = cases.run("sizes", made, args, ratios, QUICK_LIMIT_S * len(shapes))
    cases.publish(report, args, markdown)


def cases_of(
    shape: str, layers: list[str], rows: list[str], arms: list[str], scratch: Path, args: Any
) -> list[cases.Case]:
    """Write a model and its rows; return what is run with them."""
    model, n_layers = scratch / shape, int(SHAPES[shape]["num_hidden_layers"])
    write_model(model, SHAPES[shape])
    made = []
    for kind in (ROWS[name] for name in rows):
        path = scratch / f"{kind.tokens}.npz"
        title = _write_rows(kind, path, str(model), args)
        counts = cases.row_facts(TokenRows.load(path))
        batches = {"ours_batch": kind.ours_batch, "peer_batch": kind.peer_batch}
        made += [
            cases.Case(
                name=f"{shape}-{choice}-{kind.tokens}",
                model=str(model),
                rows=path,
                amounts={arm: kind.amount(arm, args.quick) for arm in arms},
                layers=layer_numbers(choice, n_layers),
                facts={"shape": shape, "layers": choice, "rows": title, **batches, **counts},
            )
            for choice in layers
        ]
    return made


def layer_numbers(choice: str, n_layers: int) -> tuple[int, ...] | None:
    """Return the numbers of the adapted layers, None for all."""
    from swlora.layer_policy import parse_policy

    return None if choice == "all" else tuple(parse_policy(choice).resolve(n_layers))


def _write_rows(kind: Rows, path: Path, model: str, args: Any) -> str:
    """Write rows of one length: E2E's where that is there; return what they are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, title = kind.made(tokenizer), f"{kind.tokens} tokens, nothing shared"
    if kind.tokens == 60:
        try:
            rows, title = cases.e2e_rows(tokenizer, args), "E2E"
        except SystemExit as error:
            title = f"{title} ({error})"
    rows.save(path)
    return title


def ratios(arms: Summary) -> dict[str, Any]:
    """Compare a case's arms, and say what share of the peak each reached."""
    needed = _flops_a_row(arms)
    share = {
        name: rate(one) * needed / one["gemm_flops"]
        for name, one in arms.items()
        if needed and "error" not in one
    }
    return {**scenario_report.ratios(arms), "share_of_peak": share}


def _flops_a_row(arms: Summary) -> float | None:
    first = arms.get("ours", {}).get("epochs", [None])[0]
    return first["necessary_flops"] / first["rows"] if first else None


def markdown(report: dict[str, Any]) -> str:
    """Return the table, a line an arm; below it losses held together, and why arms did not run."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for case in report["sizes"].values():
        lines += [_line(case, name) for name in case["arms"]]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([table, *notes(report["sizes"])])


def _line(case: dict[str, Any], name: str) -> tuple[str, ...]:
    one, found = case["arms"][name], case["ratios"]
    return (
        case["shape"],
        case["layers"],
        number(case["tokens_a_row"], 0),
        name,
        rate_cell(one),
        number(_tokens_rate(one), 0),
        memory_cell(one),
        number(found["share_of_peak"].get(name)),
        number(found["vs_peers"].get(name)),
        number(found["memory_vs_peers"].get(name)),
    )


def _tokens_rate(one: dict[str, Any]) -> float | None:
    """Return the rows' own tokens a second, padding left out."""
    first = one.get("epochs", [None])[0]
    return first["tokens"] / first["steady_s"] if first else None


if __name__ == "__main__":
    main()
