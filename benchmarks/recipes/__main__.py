"""Recipes that might reach the loss of LoRA in all layers sooner, each a line of key=value.

    python -m benchmarks.recipes --json F --grid small-steps --budget 800 [--seeds 0,1,2] [--add]
    python -m benchmarks.recipes --json F --recipes 'steps=50; steps=100 batch=8 rate=2e-3|4e-3'
    python -m benchmarks.recipes --table F [--baseline 'steps=50 order=pairs']

All run in this one process, seed by seed, one recipe after another; a case (recipe and seed) is in
F as soon as it is done, and with --add those that F has are not run again. The loss in the end is
that of all rows of the first 60 dev prompts; on the way it is measured on two rows of each, off the
clock. --report measures 130 test prompts too. Bars between values make a recipe of each.
"""

import argparse
import os
from pathlib import Path

from benchmarks import runner
from benchmarks.recipes.grids import GRIDS, expand, grid
from benchmarks.recipes.recipe import Recipe
from benchmarks.recipes.results import Results, read
from benchmarks.recipes.table import markdown
from swlora.errors import UserError


def main() -> None:
    args = _parser().parse_args()
    try:
        if args.table:
            print(markdown(read(args.table)["cases"], args.baseline))
            return
        recipes = asked(args.recipes, args.grid, args.budget, args.base)
        if args.list:
            for recipe in recipes:
                print(f"{recipe}    ({recipe.steps * recipe.batch} rows)")
            return
        run(args, recipes)
    except UserError as error:
        raise SystemExit(str(error)) from error


def asked(lines: str | None, grids: str | None, budget: int, base: str) -> list[Recipe]:
    """Return the recipes that the options name, each once; UserError where there are none."""
    found = [
        r for line in (lines or "").split(";") if line.strip() for r in expand(line, budget, base)
    ]
    found += [r for name in (grids or "").split(",") if name for r in grid(name, budget, base)]
    if not found:
        raise UserError(f"name recipes with --recipes, or with --grid one of {', '.join(GRIDS)}")
    return list(dict.fromkeys(found))


def run(args: argparse.Namespace, recipes: list[Recipe]) -> None:
    """Run every recipe with every seed, but for the cases that are there."""
    seeds = [int(seed) for seed in args.seeds.split(",")]
    results = Results(args.json, args.model, add=args.add)
    cases = [(seed, recipe) for seed in seeds for recipe in recipes]
    cases = [(s, r) for s, r in cases if not results.has(r, s, with_test=args.report)]
    print(
        f"{len(cases)} cases to run, {len(seeds) * len(recipes) - len(cases)} are there", flush=True
    )
    if not cases:
        return

    # Threads that wait must sleep: those that spin would count as CPU seconds. Read with torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks.recipes.course import Bench

    bench = Bench(runner.model_folder(args.model), args.e2e, args.points)
    for number, (seed, recipe) in enumerate(cases, start=1):
        load = runner.load()
        found = bench.run(recipe, seed, with_test=args.report)
        results.add(recipe, seed, found, load)
        outcome = found.get("error") or f"{found['dev']['nll']:.4f} nats"
        seconds = f"{found['cpu_s']:.0f} CPU s, {found['wall_s']:.0f} s"
        print(f"[{number}/{len(cases)}] {recipe} seed {seed}: {outcome}, {seconds}", flush=True)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", type=Path, help="where the results go")
    what.add_argument("--table", type=Path, help="print the table of these results; run nothing")
    what.add_argument("--list", action="store_true", help="print the recipes; run nothing")
    made.add_argument("--add", action="store_true", help="keep the cases that --json has")
    made.add_argument("--recipes", help="separated by semicolons")
    made.add_argument("--grid", help=f"comma-separated, of: {', '.join(GRIDS)}")
    made.add_argument("--base", default="", help="keys that take the place of a grid's own")
    made.add_argument(
        "--budget", type=int, default=400, help="rows that a recipe without steps runs"
    )
    made.add_argument("--seeds", default="0", help="comma-separated")
    made.add_argument("--points", type=int, default=4, help="of the curve, the end among them")
    made.add_argument("--report", action="store_true", help="measure test rows too")
    made.add_argument("--baseline", help="of --table: a recipe (default: the best plain LoRA)")
    made.add_argument("--model", default="builtin", help="builtin, a folder or a Hub id")
    made.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    return made


if __name__ == "__main__":
    main()
