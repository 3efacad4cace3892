"""What is published of a folder made by hand: every number is known, no arm disappears."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swlora.config import load_spec
from swlora.errors import UserError
from swlora.evaluation import bootstrap
from swlora.evaluation.segments import FILE
from swlora.result_json import as_json
from swlora.study import results as study_results
from swlora.study import statistics as stats
from swlora.study.compared import read_finished


def publish(folder: Path) -> dict[str, Any]:
    """Publish a study; return what results.json holds."""
    found: dict[str, Any] = as_json(study_results.publish(folder))
    return found


# `study` is an empty HandmadeStudy, `two_arms` a filled one (conftest): their steps take step_s,
# the first one 9 * step_s.
FILES = {f"{name}.{ending}" for name in ("pareto", "curves") for ending in ("svg", "png")}
FILES |= {"results.json", "results.md", "results.csv"}


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take seconds and have tests of their own."""
    if request.function is not test_what_is_returned_is_what_is_written:
        for name in ("draw_pareto", "draw_curves"):
            monkeypatch.setattr(study_results, name, lambda *_: None)


def arms_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in results["arms"]}


def test_what_is_returned_is_what_is_written(two_arms: Any) -> None:
    folder = two_arms.save()
    results = publish(folder)
    assert {path.name for path in folder.iterdir()} >= FILES
    assert json.loads((folder / "results.json").read_text()) == results
    assert [arm["name"] for arm in results["arms"]] == ["lora", "super"]
    before = {name: (folder / name).read_bytes() for name in FILES}
    assert publish(folder) == results
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_what_is_written_is_read_back_as_it_was(two_arms: Any) -> None:
    """As the page of a study does, which has no tables where it cannot."""
    folder = two_arms.save()
    found = study_results.publish(folder)
    read = read_finished(json.loads((folder / "results.json").read_text()))
    assert [arm.name for arm in read] == ["lora", "super"] and read == found.finished


def test_times(two_arms: Any) -> None:
    """28 units of step time, 5 s to attach; held-out losses, loading and evaluation left out."""
    found = arms_of(publish(two_arms.save()))
    lora, faster = found["lora"], found["super"]
    assert (lora["train_s"], lora["total_s"]) == pytest.approx((56.0, 61.0))
    assert (faster["train_s"], faster["total_s"]) == pytest.approx((28.0, 45.0))
    assert (lora["examples_per_s"], faster["examples_per_s"]) == pytest.approx((4.0, 8.0))
    assert faster["time_spread"]["total_s"]["sd"] == pytest.approx(0.0)
    gained = faster["acceleration"]
    assert gained["speed_up_percent"] == pytest.approx(100.0)
    assert gained["time_saved_percent"] == pytest.approx(100 * (1 - 45 / 61))
    # Its held-out loss falls from 3 by 0.1 a step, so it is 1.202 after 17.98 steps.
    seconds = 17.0 + 8 + 17.98
    assert gained["seconds_to_baseline_nll"] == pytest.approx(seconds)
    assert gained["time_saved_to_baseline_nll_percent"] == pytest.approx(100 * (1 - seconds / 61))
    assert lora["acceleration"] == {
        "speed_up_percent": 0.0,
        "time_saved_percent": 0.0,
        "reached_baseline_nll": True,
        "seconds_to_baseline_nll": pytest.approx(61.0),
        "time_saved_to_baseline_nll_percent": 0.0,
    }


def test_a_process_that_was_killed_takes_no_time_away(two_arms: Any) -> None:
    """run.json has the time of the last process only, the checkpoint that of all steps."""
    folder = two_arms.save()
    for seed in (0, 1):
        file = folder / f"runs/super/seed-{seed}/run.json"
        facts = json.loads(file.read_text())
        facts["timings_s"]["train"] = 1.0  # of 28 s of steps
        file.write_text(json.dumps(facts))
    found = arms_of(publish(folder))["super"]
    assert (found["train_s"], found["total_s"]) == pytest.approx((28.0, 45.0))


def test_scores_are_means_over_seeds_on_the_published_scales(two_arms: Any) -> None:
    folder = two_arms.save()
    lora = arms_of(publish(folder))["lora"]
    runs = [
        json.loads((folder / f"runs/lora/seed-{s}/result.json").read_text())["eval"] for s in (0, 1)
    ]
    expected = {
        "bleu": 100 * np.mean([run["BLEU"] for run in runs]),
        "nist": np.mean([run["NIST"] for run in runs]),
        "meteor": 100 * np.mean([run["METEOR"] for run in runs]),
        "rouge_l": 100 * np.mean([run["ROUGE_L"] for run in runs]),
        "cider": np.mean([run["CIDEr"] for run in runs]),
        "nll": 1.202,
        "english_perplexity": 22.5,
        "english_perplexity_before": 20.0,
    }
    assert {name: lora[name] for name in expected} == pytest.approx(expected)
    for name in ("bleu", "nist", "meteor", "rouge_l", "cider", "nll"):
        low, high = lora["intervals"][name]
        assert low < lora[name] < high
        one, other = sorted(run[name] for run in lora["runs"])
        assert (one, other) == (lora["spread"][name]["min"], lora["spread"][name]["max"])
    assert lora["spread"]["nll"]["sd"] == pytest.approx(0.004 / np.sqrt(2))
    assert (lora["seeds"], lora["status"], lora["n_prompts"]) == ([0, 1], "done", 41)
    assert (lora["n_trainable"], lora["adapter_bytes"]) == (1234, 5000)
    assert lora["peak_memory_bytes"] == 2_000_000_001


def test_english_text_may_not_have_been_measured(two_arms: Any) -> None:
    folder = two_arms.save()
    for path in folder.glob("runs/lora/*/result.json"):
        result = json.loads(path.read_text())
        result["eval"].pop("english_perplexity")
        result["eval"].pop("english_perplexity_before")
        path.write_text(json.dumps(result))
    lora = arms_of(publish(folder))["lora"]
    assert (lora["english_perplexity"], lora["english_perplexity_before"]) == (None, None)
    rows = [line for line in (folder / "results.md").read_text().splitlines() if "lora" in line]
    assert any(row.endswith("| n/a |") for row in rows)


def test_verdicts_come_from_paired_intervals(study: Any, make_segments: Any) -> None:
    study.settings["seeds"] = [0]
    study.settings["margin"] = {"bleu": 2.0, "nll": 0.05}
    for name, quality, nll in (("lora", 0.8, 1.2), ("like", 0.8, 1.21), ("bad", 0.6, 1.4)):
        study.arm(name, "all", (0,))
        study.run(name, 0, quality=quality, nll=nll)
    found = arms_of(publish(study.save()))
    assert found["lora"]["against_baseline"] == {}
    like, bad = found["like"]["against_baseline"], found["bad"]["against_baseline"]
    level = {"difference": 0, "interval": [0, 0], "verdict": "non-inferior", "seeds": [0]}
    assert like["bleu"] == level
    assert like["nll"]["verdict"] == "non-inferior"
    assert (bad["bleu"]["verdict"], bad["nll"]["verdict"]) == ("inferior", "inferior")
    draws = [stats.seed_draws({0: make_segments(q, n)}) for q, n in ((0.6, 1.4), (0.8, 1.2))]
    for name, official, factor in (("bleu", "BLEU", 100), ("nll", "NLL", 1)):
        expected = bootstrap.interval(factor * (draws[0][official][0] - draws[1][official][0]))
        assert bad[name]["interval"] == pytest.approx(list(expected))
        assert bad[name]["difference"] == pytest.approx(found["bad"][name] - found["lora"][name])


def test_a_loss_that_is_not_of_the_prompts_alone_is_told_without_an_interval(two_arms: Any) -> None:
    """Documents stand beside the prompts: draws of prompts would be of another loss."""
    folder = two_arms.save()
    for path in folder.glob("runs/*/*/segments.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"are_all": False}))
    for arm in arms_of(publish(folder)).values():
        assert set(arm["intervals"]) == {"bleu", "nist", "meteor", "rouge_l", "cider"}
        assert set(arm["spread"]) == {*arm["intervals"], "nll"} and arm["nll"] > 0
        assert set(arm["against_baseline"]) <= {"bleu"}


def test_no_arm_disappears(two_arms: Any) -> None:
    study = two_arms
    study.settings["arms"] += [{"name": "never", "layers": "last:1"}]
    study.arm("dora", "all")
    study.told("runs/dora/seed-0", "failed", "RuntimeError: a | b\nc")
    study.told("runs/dora/seed-1", "cancelled", "KeyboardInterrupt")
    study.arm("partly", "all")
    study.run("partly", 0)
    study.told("runs/partly/seed-1", "running")
    study.arm("nothing", "super", layers=[], reason="no super weight was verified")
    study.arm("super-last", "last:1", control_of="super", reason="no rate could be tried")
    results = publish(study.save())
    assert {arm["name"]: arm["status"] for arm in results["arms"]} == {
        "lora": "done",
        "super": "done",
        "super-last": "missing",
        "never": "missing",
        "dora": "failed",
        "partly": "partly done",
        "nothing": "no layers",
    }
    assert [arm["name"] for arm in results["arms"]][:3] == ["lora", "never", "super"]
    unfinished = {row["run"]: (row["status"], row["reason"]) for row in results["unfinished"]}
    assert unfinished == {
        "runs/dora/seed-0": ("failed", "RuntimeError: a | b\nc"),
        "runs/dora/seed-1": ("cancelled", "KeyboardInterrupt"),
        "runs/partly/seed-1": ("running", None),
        "runs/nothing/seed-0": ("no layers", "no super weight was verified"),
        "runs/nothing/seed-1": ("no layers", "no super weight was verified"),
        **{f"runs/super-last/seed-{s}": ("missing", "no rate could be tried") for s in (0, 1)},
        **{f"runs/never/seed-{s}": ("missing", "not started") for s in (0, 1)},
    }
    report = (study.folder / "results.md").read_text()
    assert "| runs/dora/seed-0 | failed | RuntimeError: a \\| b c |" in report
    assert "| partly | 1 of 2 |" in report


def test_an_arm_with_the_runs_of_another_one(two_arms: Any) -> None:
    two_arms.arm("auto", "auto:0.75", same_as="lora", one_off_s=7.0)
    two_arms.told("runs/lora/seed-2", "failed", "no more space")
    two_arms.facts["arms"]["lora"]["seeds"].append(2)
    results = publish(two_arms.save())
    arms = arms_of(results)
    assert (arms["auto"]["same_as"], arms["lora"]["same_as"]) == ("lora", None)
    assert arms["auto"]["nll"] == arms["lora"]["nll"]
    assert arms["auto"]["total_s"] == pytest.approx(arms["lora"]["total_s"] + 7)
    assert arms["auto"]["against_baseline"] == {}  # nothing is compared with itself
    assert [row["run"] for row in results["unfinished"]] == ["runs/lora/seed-2"]
    report = (two_arms.folder / "results.md").read_text()
    assert "auto found the layers of lora: the runs are the same" in report


def test_a_run_that_says_it_is_done_and_is_not(two_arms: Any) -> None:
    (two_arms.folder / "runs/super/seed-1" / FILE).unlink()
    results = publish(two_arms.save())
    assert arms_of(results)["super"]["status"] == "partly done"
    (row,) = results["unfinished"]
    assert (row["run"], row["status"]) == ("runs/super/seed-1", "failed")
    assert "holds no readable segments" in row["reason"]


def test_nothing_is_done_yet(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    for name in ("draw_pareto", "draw_curves"):
        monkeypatch.setattr(study_results, name, lambda *given: drawn.append(given))
    results = publish(study.save())
    assert [arm["status"] for arm in results["arms"]] == ["missing"]
    assert drawn == []
    assert "0 of 1 arm has results" in (study.folder / "results.md").read_text()


def test_without_a_baseline_nothing_is_compared(two_arms: Any) -> None:
    two_arms.told("runs/lora/seed-0", "failed", "disk full")
    two_arms.told("runs/lora/seed-1", "failed", "disk full")
    results = publish(two_arms.save())
    arm = arms_of(results)["super"]
    assert (arm["acceleration"], arm["against_baseline"]) == (None, {})
    assert results["target_nll"] is None
    assert "The baseline lora has no result" in (two_arms.folder / "results.md").read_text()


def test_the_loss_of_the_baseline_may_not_be_reached_or_not_be_measured(two_arms: Any) -> None:
    for name, kwargs in (("worse", {"nll": 1.3}), ("blind", {"held_out": False})):
        two_arms.arm(name, "last:1", (0,))
        two_arms.run(name, 0, **kwargs)
    found = arms_of(publish(two_arms.save()))
    reached = [found[name]["acceleration"]["reached_baseline_nll"] for name in ("worse", "blind")]
    assert reached == [False, None]
    assert found["worse"]["acceleration"]["seconds_to_baseline_nll"] is None
    assert (found["worse"]["curve"]["kind"], found["blind"]["curve"]["kind"]) == (
        "held-out",
        "training",
    )
    report = (two_arms.folder / "results.md").read_text()
    time_rows = {line.split(" | ")[0]: line for line in report.splitlines() if " | 8.0 | " in line}
    assert "| not reached | not reached |" in time_rows["| worse"]
    assert "| n/a | n/a |" in time_rows["| blind"]


def test_beam_search_is_judged_for_itself(two_arms: Any) -> None:
    two_arms.settings["beam"] = {"arms": ["lora", "super"], "seeds": [1]}
    for arm, quality in (("lora", 0.8), ("super", 0.5)):
        decode = {"decode.num_beams": 4, "decode.length_penalty": 0.9}
        two_arms.run(arm, 1, quality=quality, phase="beam", spec=load_spec(None, decode))
    found = arms_of(publish(two_arms.save()))
    assert found["lora"]["beam"]["seeds"] == [1]
    assert found["super"]["beam"]["against_baseline"]["bleu"]["verdict"] == "inferior"
    assert found["super"]["against_baseline"]["bleu"]["verdict"] == "non-inferior"
    assert found["super"]["beam"]["bleu"] < found["super"]["bleu"]
    report = (two_arms.folder / "results.md").read_text()
    assert "4 beams, length penalty 0.9, no repeated 0-grams." in report


def test_a_score_that_one_run_lacks_is_no_score_of_the_arm(study: Any) -> None:
    study.arm("lora", "all")
    study.run("lora", 0)
    study.run("lora", 1, meteor=False)
    lora = arms_of(publish(study.save()))["lora"]
    assert lora["meteor"] is None
    assert "meteor" not in lora["intervals"]
    assert lora["runs"][0]["meteor"] is not None


def test_controls_that_were_switched_off_are_said(two_arms: Any) -> None:
    publish(two_arms.save())
    assert "Without controls" not in (two_arms.folder / "results.md").read_text()
    two_arms.settings["controls"] = False
    assert publish(two_arms.save())["controls"] is False
    assert "**Without controls**" in (two_arms.folder / "results.md").read_text()


def test_ranks_that_were_pruned_are_in_the_report(study: Any) -> None:
    study.settings["seeds"] = [0]
    study.arm("lora", "all", (0,))
    study.run("lora", 0, trained={"rank_pattern": {"0.q": 6, "0.v": 1, "1.q": 5}})
    study.arm("full", "all", (0,))
    study.run("full", 0, spec=load_spec(None, {"adapter.method": "full"}))
    found = arms_of(publish(study.save()))
    assert found["lora"]["rank_pattern"] == {"0.q": 6, "0.v": 1, "1.q": 5}
    assert found["full"]["rank"] is None
    report = (study.folder / "results.md").read_text()
    assert "| 1 to 6, 12 in 3 matrices |" in report


def test_rates_that_were_tried_are_in_the_report(two_arms: Any) -> None:
    facts = two_arms.facts["arms"]
    nll = {"0.001": 1.5, "0.004": 1.25, "0.016": None}
    facts["lora"]["rate"] |= {"nll": nll, "at_edge": True}
    facts["super"]["rate"] = {"nll": {"0.0005": 1.75}, "chosen": 5e-4, "cost_s": 7.5}
    publish(two_arms.save())
    report = (two_arms.folder / "results.md").read_text()
    assert "| arm | 0.0005 | 0.001 | 0.004 | 0.016 |" in report
    assert "| **lora** (baseline) |  | 1.500 | **1.250** | no result |" in report
    assert "| super | **1.750** |  |  |  |" in report
    assert "(edge of the grid)" in report


ADVICE = "`rate: {extend: N}`"


@pytest.mark.parametrize(
    ("extend", "rate", "said"),
    [
        (0, {"grid": [1e-3, 4e-3]}, f"{ADVICE} in the study file tries on beyond it; a changed"),
        (3, {"grid": [1e-3, 4e-3]}, f"{ADVICE} with N above 3 in the study file tries on"),
        (10, {"grid": [1e-3, 4e-3]}, None),  # no more can be asked for
        (0, {"grid": [3.999e-3, 4e-3]}, None),  # nothing lies beyond, rounded
        (3, {"grid": [1e-3, 4e-3], "untried": "1.6e-2 failed"}, None),
        (0, {"grid": [1e-3, 4e-3, 8e-3], "at_edge": False}, None),
    ],
)
def test_the_report_advises_what_the_study_file_can_use(
    two_arms: Any, extend: int, rate: dict[str, Any], said: str | None
) -> None:
    two_arms.settings["rate"]["extend"] = extend
    told = two_arms.facts["arms"]["lora"]["rate"]
    told |= {"nll": {"0.001": 1.5, "0.004": 1.25}, "at_edge": True} | rate
    publish(two_arms.save())
    report = (two_arms.folder / "results.md").read_text()
    assert ADVICE not in report if said is None else said in report
    assert ("may not be the best" in report) == told["at_edge"]
    assert ("\nlora: 1.6e-2 failed\n" in report) == ("untried" in rate)


def test_the_published_table_stands_beside(two_arms: Any) -> None:
    results = publish(two_arms.save())
    rows = {r["method"]: (r["acceleration_percent"], r["quality"]) for r in results["published"]}
    assert rows["LoRA in the layers with super weights"] == (25.47, 66.85)
    assert rows["DoRA"] == (-36.0, 68.22)
    report = (two_arms.folder / "results.md").read_text()
    assert "| DoRA | −36.00 | 68.22 |" in report


def test_runs_on_different_data_are_refused(two_arms: Any) -> None:
    path = two_arms.folder / "runs/super/seed-1/run.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"data_sha256": "another"}))
    with pytest.raises(UserError, match="different data"):
        publish(two_arms.save())


def test_folders_that_are_no_study(study: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no readable study\.json"):
        publish(tmp_path)
    folder = study.save()
    (folder / "study.yaml").write_text("margin: {bleu: -1}\n")
    with pytest.raises(UserError, match=r"study\.yaml: .*margin\.bleu"):
        publish(folder)
