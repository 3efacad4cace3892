"""Recipes: how they are read and refused, their grids, the file of cases, and its table."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.recipes import course, grids
from benchmarks.recipes.__main__ import asked, main
from benchmarks.recipes.recipe import Recipe
from benchmarks.recipes.table import difference, markdown
from tests.support.data_files import as_csv, write

from swlora.errors import UserError

WHOLE = (
    "steps=8 batch=4 order=pairs data=chats prompts=9 rows=6 choice=hard rank=2 scale=16/sqrt(r) "
    "targets=mlp layers=last:2 gradient_start=0.5 optimizer=scaled-adamw rate=0.001 beta1=0.8 "
    "beta2=0.98 decay=0.1 clip=2.0 damping=0.1 b_alone=1 schedule=sqrt:0.5 warmup=0.1 average=0.25 "
    "jump=4"
)


def test_a_recipe_is_written_as_it_is_read() -> None:
    recipe = Recipe.parse(WHOLE)
    assert str(recipe) == WHOLE
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse("steps=50 batch=32 rate=4e-3")) == "steps=50"
    assert Recipe.parse("rate=1.23456789e-05 steps=2").rate == 1.23456789e-05


def test_a_decay_is_no_matter_of_the_rank():
    assert Recipe.parse("steps=5 rank=64 decay=0.1").decay == 0.1


@pytest.mark.parametrize(
    ("text", "scale"),
    [("scale=8", 8.0), ("scale=32/r", 2.0), ("scale=16/sqrt(r)", 4.0), ("method=miss", 1.0)],
)
def test_the_scale_of_the_product_may_follow_the_rank(text: str, scale: float) -> None:
    assert Recipe.parse(f"steps=1 rank=16 {text}").scale_value == scale


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("batch=8", "steps=N is missing"),
        ("steps=5 batch", "is not key=value"),
        ("steps=5 steps=6", "steps is there twice"),
        ("steps=5 rates=1", "no key is called 'rates'"),
        ("steps=5 rate=fast", "rate=fast is no number"),
        ("steps=5.5", "steps=5.5 is no whole number"),
        ("steps=5 rate=nan", "rate=nan is no number"),
        ("steps=0", "steps must be above 0"),
        ("steps=5 rows=0", "rows must be above 0"),
        ("steps=5 beta2=1", "beta2 must be from 0"),
        ("steps=5 order=sorted", "order=sorted is none of prompts, pairs"),
        ("steps=5 optimizer=sgd", "optimizer=sgd is none of adamw"),
        ("steps=5 scale=r", "scale=r is none of"),
        ("steps=5 scale=1e", "scale=1e is none of"),
        ("steps=5 schedule=sqrt", "schedule=sqrt is none of"),
        ("steps=5 schedule=linear:1", "schedule=linear:1 is none of"),
        ("steps=5 targets=plop", "plop:N takes N kinds"),
        ("steps=5 layers=auto:0.5", "has to be found first"),
        ("steps=5 layers=all:3", "is not understood"),
        ("steps=5 average=0.1", "at least two of them"),
        ("steps=5 jump=5", "there are no more than steps"),
        ("steps=5 decay=300", "decay times rate"),
        # keys without effect
        ("steps=5 optimizer=lora-muon beta2=0.9", "lora-muon has no beta2"),
        ("steps=5 optimizer=lora-muon scale=8", "lora-muon has no scale"),
        ("steps=5 optimizer=lora-rite damping=0.1", "lora-rite has no damping"),
        ("steps=5 damping=0.01", "adamw has no damping"),
        ("steps=5 choice=hard", "choice needs rows=N"),
        ("steps=5 method=miss scale=8", "miss has no scale"),
        ("steps=5 method=full rank=8", "full has no rank"),
        ("steps=5 method=pissa b_alone=2", "pissa has no b_alone"),
        (
            "steps=5 method=miss optimizer=lora-rite",
            "miss is trained with adamw, not with lora-rite",
        ),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_in_a_line(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem.replace("(", r"\(")) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_grid_has_recipes_of_the_budget(name: str) -> None:
    recipes = grids.grid(name, budget=401)
    assert len(recipes) == len(set(map(str, recipes))) > 1
    if name != "earlier":
        assert all(401 <= r.steps * r.batch < 401 + r.batch for r in recipes)
    if name == "data":
        assert {r.rows for r in recipes} == {401}


def test_a_base_takes_the_place_of_a_grids_keys() -> None:
    recipes = grids.grid("baseline", 64, base="batch=4 decay=0.1")
    assert {(r.steps, r.batch, r.decay) for r in recipes} == {(16, 4, 0.1)}
    assert len(recipes) < len(grids.grid("baseline", 64))
    found = asked("steps=3 rate=1e-3|2e-3; steps=3 rate=2e-3", None, 64, "")
    assert [str(r) for r in found] == ["steps=3 rate=0.001", "steps=3 rate=0.002"]
    with pytest.raises(UserError, match="no grid is called 'wide'"):
        asked(None, "wide", 64, "")
    with pytest.raises(UserError, match="name recipes"):
        asked(" ; ", None, 64, "")


@pytest.fixture(scope="module")
def e2e(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like E2E's: 24 training prompts with three rows each."""
    folder = tmp_path_factory.mktemp("recipes") / "e2e"
    for name, prompts in (("trainset", 24), ("devset", 3), ("testset_w_refs", 2)):
        mrs = [(f"name[{name[0]}{i}], food[{'xyz'[i % 3]}]", "xyz"[i % 3]) for i in range(prompts)]
        says = ("{0} food.", "Eat {0}.", "{0} it is.")
        rows = [(mr, text.format(food)) for mr, food in mrs for text in says]
        write(folder / f"{name}.csv", as_csv([("mr", "ref"), *rows]))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes", *map(str, arguments)])
    main()


def test_a_file_goes_on_where_it_was_left(
    monkeypatch: pytest.MonkeyPatch, model_folder: Any, e2e: Path, tmp_path: Path
) -> None:
    options = ["--model", model_folder("llama"), "--e2e", e2e, "--points", 2]
    options += ["--recipes", "steps=2 batch=4 order=iid optimizer=adamw|lora-rite"]
    file, again = tmp_path / "results.json", tmp_path / "again.json"
    run(monkeypatch, "--json", again, "--seeds", "0,1", *options)
    whole = json.loads(again.read_text())
    assert whole["model"] == model_folder("llama").name, "not where it lies"
    assert [(c["seed"], c["settings"]["optimizer"]) for c in whole["cases"]] == [
        *((0, "adamw"), (0, "lora-rite"), (1, "adamw"), (1, "lora-rite"))
    ]
    case = whole["cases"][0]
    assert (case["recipe"], case["rows"], case["machine"]) == ("steps=2 batch=4 order=iid", 8, 0)
    assert [point["step"] for point in case["curve"]] == [1, 2]
    assert 0 < case["curve"][0]["cpu_s"] <= case["cpu_s"]
    assert case["dev"]["nll"] == pytest.approx(
        sum(case["dev"]["nats"]) / sum(case["dev"]["tokens"])
    )
    assert len(case["dev"]["nats"]) == 3 and "test" not in case

    one_run, n_runs = course.Bench.run, 0

    def interrupted(*arguments: Any, **settings: Any) -> dict[str, Any]:
        nonlocal n_runs
        n_runs += 1
        if n_runs == 3:
            raise KeyboardInterrupt
        return one_run(*arguments, **settings)

    monkeypatch.setattr(course.Bench, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--json", file, "--seeds", "0,1", *options)
    assert len(json.loads(file.read_text())["cases"]) == 2
    with pytest.raises(SystemExit, match="is there already: --add keeps"):
        run(monkeypatch, "--json", file, *options)
    run(monkeypatch, "--json", file, "--seeds", "0,1", "--add", *options)
    assert n_runs == 5
    found = json.loads(file.read_text())["cases"]
    assert [c["dev"]["nats"] for c in found] == [c["dev"]["nats"] for c in whole["cases"]]

    # A report needs the test rows too, so the case is run anew and takes the other's place.
    run(monkeypatch, "--json", file, "--add", "--report", *options)
    found = json.loads(file.read_text())["cases"]
    assert n_runs == 7 and len(found) == 4
    assert [len(c["test"]["nats"]) for c in found[2:]] == [2, 2]
    run(monkeypatch, "--json", file, "--add", *options)
    assert n_runs == 7
    with pytest.raises(SystemExit, match="is of the model"):
        run(monkeypatch, "--json", file, "--add", "--recipes", "steps=1")


def test_mistakes_end_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="no key is called 'step'"):
        run(monkeypatch, "--json", tmp_path / "f.json", "--recipes", "step=3")
    other = tmp_path / "other.json"
    other.write_text('{"benchmark": "speed"}')
    with pytest.raises(SystemExit, match="holds no cases"):
        run(monkeypatch, "--table", other)
    for one, said in (
        ("{}", "cannot be read as results"),
        ('{"settings": {"layer": 3}}', "cannot be read as results"),
        ('{"settings": {"steps": 3}}', "without recipe, seed or outcome"),
    ):
        other.write_text(f'{{"benchmark": "recipes", "model": "m", "cases": [{one}]}}')
        with pytest.raises(SystemExit, match=said):
            run(monkeypatch, "--table", other)
    run(monkeypatch, "--list", "--grid", "ends", "--budget", "160")
    assert "steps=10 batch=16 order=pairs rate=0.002 schedule=sqrt:0.2    (160 rows)" in (
        capsys.readouterr().out
    )


def case(recipe: str, seed: int, nll: float, cpu_s: float, **more: Any) -> dict[str, Any]:
    """A case with three prompts of ten tokens, whose loss falls from 4 to `nll` in a line."""
    loss = {"nll": nll, "nats": [10 * (nll + d) for d in (-0.1, 0, 0.1)], "tokens": [10.0] * 3}
    curve = [{"step": i, "cpu_s": i * cpu_s / 2, "nll": (4 + (nll - 4) * i / 2)} for i in (1, 2)]
    return {
        **{"recipe": recipe, "seed": seed, "settings": Recipe.parse(recipe).settings()},
        **{"rows": 1000, "nodes": 20_000, "cpu_s": cpu_s, "wall_s": cpu_s, "dev": loss},
        **{"curve": curve, **more},
    }


CASES = [
    *(case("steps=50 rate=0.002", seed, 1.3 + seed / 100, 100) for seed in (0, 1, 2)),
    *(case("steps=50 rate=0.008", seed, 1.4, 100) for seed in (0, 1, 2)),
    *(case("steps=25 rank=16", seed, 1.2 + seed / 100, 40, test={"nll": 1.25}) for seed in (0, 1)),
    {
        **case("steps=25 optimizer=lora-muon", 0, 9.0, 1),
        "error": "the loss is not finite in step 2",
    },
]


def test_the_table_holds_recipes_against_the_best_plain_one() -> None:
    lines = markdown(CASES, None).splitlines()
    assert lines[:3] == ["e2e", "", "baseline: steps=50 rate=0.002"]
    assert len({line.count("|") for line in lines[4:9]}) == 1
    best, base, worse = lines[6:9]
    # 4 falls to 1.32 (the baseline's 1.31 + 0.01) after 2.68 / 2.8 of the 40 s of seed 0
    assert best.startswith(
        "| steps=25 rank=16 | 2 | 1,000 | 20,000 | 40.0 | 40.0 | 1.2050 | 1.2000"
    )
    assert "| -0.1000 [-0.1000, -0.1000] | 0.40 | 31 | 0.38 | 1.2500 |" in best
    assert base.startswith("| steps=50 rate=0.002 | 3 |") and "| baseline | 1.00 | 25 |" in base
    assert "not reached by 3" in worse
    assert lines[-1] == "- steps=25 optimizer=lora-muon, seed 0: the loss is not finite in step 2"
    again = markdown(CASES, "rate=8e-3 steps=50").splitlines()
    assert again[2] == "baseline: steps=50 rate=0.008"
    with pytest.raises(UserError, match="has no result here"):
        markdown(CASES, "steps=51")
    # One lucky seed makes no baseline, and another data set has its own
    lucky = case("steps=50 rate=0.003", 0, 1.1, 100)
    chats = case("steps=50 data=chats", 0, 0.4, 100)
    again = markdown([*CASES, lucky, chats], "steps=50 rate=0.008").splitlines()
    heads = [line for line in again if line.startswith("baseline:")]
    assert heads == ["baseline: steps=50 rate=0.008", "baseline: steps=50 data=chats"]
    assert markdown([*CASES, lucky], None).splitlines()[2] == lines[2]


def test_a_difference_has_the_interval_of_prompts_and_seeds() -> None:
    own, base = [case("steps=5 rank=2", s, 1.2, 1) for s in (0, 1, 2)], CASES[:3]
    own[0]["dev"]["nats"][0] += 3.0
    found = difference(own, base)
    assert found is not None
    mean, interval = found
    assert mean == pytest.approx(-0.11)
    assert interval.low < mean < interval.high
    assert difference([case("steps=5 rank=2", 7, 1.2, 1)], base) is None
