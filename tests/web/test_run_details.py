"""What a run's page says of it: what was run, scores, predictions; and runs that never started."""

import json
import os
from html import unescape

import pytest
from tests.support.data_files import write_rows
from tests.support.page_reading import look

from swlora.config import load_spec
from swlora.data.sources import SAMPLE_SOURCE
from swlora.files import write_json
from swlora.runs import Run
from swlora.samples_file import Sample, add_samples
from swlora.web.pages.run_facts import MAX_OWN_SCORES, plain, scores
from swlora.web.pages.run_files import read_predictions

EVALUATED = {
    **{"BLEU": 0.5663, "METEOR": None, "nll": 1.4444, "english_perplexity": 31.12},
    **{"exact_match": 0.25, "chrf": 41.04, "own": {"share": 0.123456, "odd": "x"}},
    **{"split": "test", "n_prompts": 100, "decode": {"num_beams": 10, "temperature": 0.0}},
}
TRAINED = {"layers": [2, 3, 4, 11], "n_trainable": 162816, "steps": 51, "planned_steps": 90}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of runs, which is looked at anew for every request."""
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)
    return tmp_path / "runs"


def make_run(folder, command="train-eval", result=None, **facts):
    """Leave a run folder as a run does."""
    overrides = {"adapter.method": "dora", "adapter.rank": 8, "adapter.layers": "auto:0.5"}
    run = Run.create(folder, load_spec(None, overrides | {"train.epochs": 3}), command)
    run.record(status="done", **facts)
    run.add_timing("load_model", 3.4)
    run.write_result(result or {})
    return folder


def test_a_run_says_what_was_run(make, browse, root):
    folder = make_run(
        root / "mine",
        result={"train": TRAINED, "eval": EVALUATED},
        model_source="the folder /home/me/my models/SmolLM2",
        data_source="rows of /data/x y/a.jsonl, evaluated on /data/b.jsonl",
    )
    for name, size in (("adapter", 1_234_567), ("best", 1_200_000)):
        (folder / name).mkdir()
        (folder / name / "adapter_model.safetensors").write_bytes(b"x" * size)
    with browse(make(runs=root)) as client:
        response = client.get("/runs/mine", headers={"accept": "text/html"})
        terms = dict(terms_of(response.text))
    assert terms | {"Time": "", "Versions": ""} == terms | {
        "Model": "the folder SmolLM2",
        "Data": "rows of a.jsonl, evaluated on b.jsonl",
        "Method": "dora",
        "Rank": "8",
        "Layers": "2–4, 11 (auto:0.5)",
        "Trained weights": "162,816",
        "Epochs": "3",
        "Steps": "51 of 90",
        "Adapter": "adapter/ (1.23 MB), best/ (1.20 MB)",
        "Evaluated on": "test split",
        "Prompts": "100",
        "Decoding": "10 beams",
        "BLEU": "56.6",
        "exact": "25.0",
        "chrF": "41.0",
        "share": "0.1235",
        "NLL, nats a token": "1.444",
        "English perplexity": "31.1",
        "Time": "",
        "Versions": "",
    }
    assert "load model 3 s" in terms["Time"] and "torch" in terms["Versions"]
    assert "METEOR" not in terms and "/home" not in response.text and "/data" not in response.text


def terms_of(text: str) -> list[tuple[str, str]]:
    """The terms of a page's lists with their values."""
    cells = [part.split("</d")[0] for part in text.split("<dd>")[1:]]
    terms = [part.split("</d")[0] for part in text.split("<dt>")[1:]]
    return [(unescape(a), unescape(b)) for a, b in zip(terms, cells, strict=True)]


def test_the_last_losses_stand_among_the_numbers(make, browse, root):
    folder = make_run(root / "mine", "train")
    rows = [{"step": 1, "loss": 3.0, "eval_nll": 2.5}, {"step": 2, "loss": 2.0}]
    write_rows(folder / "metrics.jsonl", rows)
    with browse(make(runs=root)) as client:
        text = client.get("/runs/mine", headers={"accept": "text/html"}).text
    terms = dict(terms_of(text))
    assert (terms["loss"], terms["held-out loss"]) == ("2.000", "2.500")


def test_an_evaluation_of_the_sample_says_so(make, browse, root):
    make_run(root / "sample", "eval", {"eval": EVALUATED}, data_source="made up", is_sample=True)
    own = {"data_source": SAMPLE_SOURCE, "is_sample": False}
    make_run(root / "own", "eval", {"eval": EVALUATED}, **own)
    with browse(make(runs=root)) as client:
        assert "nothing about E2E" in look(client, "/runs/sample").text
        assert "nothing about E2E" not in look(client, "/runs/own").text


def test_an_evaluation_of_the_sample_from_before_it_was_recorded_says_so(make, browse, root):
    result = {"eval": EVALUATED | {"data": SAMPLE_SOURCE + ", since the Hub cannot be reached"}}
    make_run(root / "sample", "eval", result)
    make_run(root / "own", "eval", {"eval": EVALUATED}, data_source="E2E NLG from the folder x")
    with browse(make(runs=root)) as client:
        assert "made-up sample" in look(client, "/runs").text
        assert "nothing about E2E" in look(client, "/runs/sample").text
        assert "nothing about E2E" not in look(client, "/runs/own").text


@pytest.mark.parametrize("column", ["prompt", "mr"])
def test_predictions_stand_beside_their_references(make, browse, root, column):
    folder = make_run(root / "mine", "eval")
    lines = [f"{column},prediction,ref_1,ref_2", '"name[A], <b>",It is A.,"A, it is.",']
    lines += [f"p{k},out{k},r," for k in range(20)]
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    with browse(make(runs=root)) as client:
        page = look(client, "/runs/mine")
    for said in ("name[A], <b>", "It is A.", "A, it is.", "1 reference", "out8", "the first 10"):
        assert said in page.text
    assert "out9" not in page.text


def test_samples_stand_under_their_prompts(make, browse, root):
    folder = make_run(root / "mine", "train")
    for step in range(1, 8):
        add_samples(
            folder, [Sample(step, "name[A], <b>", f"said {step} <i>"), Sample(step, "q", "")]
        )
    with browse(make(runs=root)) as client:
        page = look(client, "/runs/mine")
    for said in ("name[A], <b>", "step 7 said 7 <i>", "said 3 <i>", "nothing was generated"):
        assert said in page.text
    assert "said 2" not in page.text


ODD_FILES = ["", "mr", "mr,prediction\n", "a,b\n1,2\n", "\0", '"', "mr,prediction\n" + "x" * 10**6]


@pytest.mark.parametrize("content", ODD_FILES)
def test_odd_predictions_are_none(tmp_path, content):
    (tmp_path / "predictions.csv").write_text(content)
    assert read_predictions(tmp_path) == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_file_is_not_read(make, browse, root, tmp_path, kind):
    folder = make_run(root / "mine", "eval")
    sample = '{"step": 1, "prompt": "SECRET", "text": "SECRET"}\n'
    (tmp_path / "secret").write_text(f"mr,prediction\nSECRET,SECRET\n{sample}")
    (folder / "config.yaml").unlink()
    for name in ("config.yaml", "predictions.csv", "samples.jsonl"):
        if kind == "link":
            (folder / name).symlink_to(tmp_path / "secret")
        elif kind == "folder":
            (folder / name).mkdir()
        else:
            os.mkfifo(folder / name)
    with browse(make(runs=root)) as client:
        assert "SECRET" not in look(client, "/runs/mine").text


ODD_CONFIGS = [
    "",
    "[",
    "- 1",
    "adapter: 3",
    "adapter: {method: [1], layers: {a: 1}, rank: x}",
    "\0",
]


@pytest.mark.parametrize("content", [*ODD_CONFIGS, "[" * 5000, "adapter: {method: " + "x" * 10**5])
def test_an_odd_configuration_gives_less(make, browse, root, content):
    folder = make_run(root / "mine", result={"train": TRAINED})
    (folder / "config.yaml").write_text(content)
    with browse(make(runs=root)) as client:
        assert "162,816" in look(client, "/runs/mine").text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/a/b c/d.csv", "d.csv"),
        ("a/b", "a/b"),
        ("the folder /x/y", "the folder y"),
        (3.0, "3"),
        (0.002, "0.002"),
        ([1], ""),
        (None, ""),
    ],
)
def test_values_are_text_without_folders(value, shown):
    assert plain(value) == shown


def test_runs_that_never_started_are_counted_and_shown_on_demand(make, browse, root):
    for name, status in (("typo", "failed"), ("stopped", "cancelled"), ("later", "failed")):
        facts = {
            "status": status,
            "command": "train",
            "reason": "UserError: no such layer in /home/me/x",
        }
        write_json(root / name / "run.json", facts)
    (root / "later/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    make_run(root / "mine")
    with browse(make(runs=root)) as client:
        page = look(client, "/runs")
        assert "2 runs that never started are not shown" in page.text
        assert listed(page) == {"later", "mine"}
        assert "/runs?all=1" in [a.get("href") for a in page.all("a")]
        everything = look(client, "/runs?all=1")
        assert listed(everything) == {"later", "mine", "typo", "stopped"}
        assert "no such layer" in everything.text and "UserError" not in everything.text
        assert "/home" not in everything.text
        (live,) = [a for a in everything.all("div") if "data-live" in a]
        assert "typo" in client.get(live["data-live"]).text  # also when it is kept up to date
        assert "typo" not in client.get("/runs?part=list").text


def listed(page) -> set[str]:
    """The runs in the list."""
    links = [str(a.get("href")) for a in page.all("a")]
    return {link.removeprefix("/runs/") for link in links if link.startswith("/runs/")}


def test_figures_that_the_page_draws_itself_are_no_pictures(make, browse, root):
    folder = make_run(root / "mine", "train")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    for name in ("loss.png", "superweights.png", "superweights-dose.png", "other.png"):
        (folder / name).write_bytes(b"\x89PNG")
    points = [{"scale": k, "perplexity": 30.0 - k} for k in range(3)]
    found = {"candidates": [], "dose_curve": {"points": points}}
    with browse(make(runs=root)) as client:
        pictures = pictures_of(look(client, "/runs/mine"))
        assert pictures == ["other.png", "superweights-dose.png", "superweights.png"]
        write_json(folder / "result.json", {"identify": found})
        page = look(client, "/runs/mine")
        assert pictures_of(page) == ["other.png", "superweights.png"]  # no numbers for that one
        assert "Perplexity as this one weight is scaled" in page.text


def pictures_of(page) -> list[str]:
    """The files that a page shows as pictures."""
    sources = [str(a["src"]) for a in page.all("img")]
    return [source.partition("file=")[2] for source in sources if "file=" in source]


def test_scores_of_ones_own_metric_are_shown_and_not_without_end() -> None:
    own = {"valid_json": 0.25, "broken": "x", **{f"s{k}": k for k in range(99)}}
    shown = scores({"eval": {"nll": 1.5, "own": own}})
    assert shown[:3] == [("NLL, nats a token", "1.500"), ("valid_json", "0.25"), ("s0", "0")]
    assert len(shown) == MAX_OWN_SCORES  # the broken one is left out, NLL is there
