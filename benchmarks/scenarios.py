"""Training where people work: the same arms on seven kinds of data, against the best of all peers.

    python -m benchmarks.scenarios [--quick] --json F [--scenarios a,b] [--arms a,b] [--rounds N]
    python -m benchmarks.scenarios --table F       # the Markdown table of a result

The embedded model, LoRA in all layers; how arms are run is in `cases.py`. A quick run is one short
round, 20 minutes at most on two idle cores; in it TRL and the compiled Unsloth, which starts
slowly, take part in E2E only.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import cases, runner
from benchmarks.arms import SCENARIO_ARMS
from benchmarks.scenario_data import SCENARIOS, Scenario
from benchmarks.scenario_report import markdown, ratios
from benchmarks.token_rows import TokenRows

QUICK_LIMIT_S = 1190.0
# Arms of which a quick run does without in the other scenarios
QUICK_SCENARIOS = dict.fromkeys(("trl", "unsloth-compiled"), ("e2e",))


def main() -> None:
    parser = cases.parser("Training speed on seven kinds of data.", "20 minutes at most")
    parser.add_argument("--scenarios", help=f"comma-separated, of: {', '.join(SCENARIOS)}")
    for arms in ("ours", "peer"):
        step = f"rows a step of the {arms} arms, in place of the scenario's"
        parser.add_argument(f"--{arms}-batch", type=_rows_a_step, help=step)
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    sizes = {"ours_batch": args.ours_batch, "peer_batch": args.peer_batch}
    given = {name: size for name, size in sizes.items() if size is not None}
    names = cases.named(args.scenarios, SCENARIOS, "scenario")
    scenarios = [replace(SCENARIOS[name], **given) for name in names]
    arms = cases.named(args.arms, SCENARIO_ARMS, "arm")
    cases.find_unsloth(args)
    cases.publish(measured(scenarios, arms, args), args, markdown)


def _rows_a_step(text: str) -> int:
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return n


def measured(scenarios: list[Scenario], arms: list[str], args: argparse.Namespace) -> Any:
    """Run the arms of the scenarios; return the report."""
    model = runner.builtin_model()
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        made = [
            case_of(one, arms_of(one, arms, args), model, Path(scratch), args) for one in scenarios
        ]
        return cases.run("scenarios", made, args, ratios, QUICK_LIMIT_S)


def arms_of(scenario: Scenario, arms: list[str], args: argparse.Namespace) -> list[str]:
    """Return the arms that are run on a scenario; all that `--arms` names, whatever `--quick`."""
    if not args.quick or args.arms:
        return arms
    return [a for a in arms if scenario.name in QUICK_SCENARIOS.get(a, (scenario.name,))]


def case_of(
    scenario: Scenario, arms: list[str], model: str, scratch: Path, args: argparse.Namespace
) -> cases.Case:
    """Write the rows of a scenario, and return what is run on them."""
    path = scratch / f"{scenario.name}.npz"
    reason = _write_rows(scenario, path, model, args)
    batches = {"ours_batch": scenario.ours_batch, "peer_batch": scenario.peer_batch}
    counts = cases.row_facts(None if reason else TokenRows.load(path))
    return cases.Case(
        name=scenario.name,
        model=model,
        rows=reason or path,
        amounts={arm: scenario.amount(arm, args.quick) for arm in arms},
        layers=None,
        facts={"title": scenario.title, **batches, **counts},
    )


def _write_rows(scenario: Scenario, path: Path, model: str, args: argparse.Namespace) -> str | None:
    """Write the rows of a scenario; return why that cannot be done."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        if scenario.make is None:
            rows = cases.e2e_rows(tokenizer, args)
        else:
            rows = scenario.rows(tokenizer, args.quick)
    except SystemExit as error:
        return str(error)
    rows.save(path)
    return None


if __name__ == "__main__":
    main()
