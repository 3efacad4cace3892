"""The pages of runs and studies: what lies in the folders, also when it is torn or odd."""

import json
import os
import re
import sys
import time
from html import unescape
from pathlib import Path

import pytest

from swlora import work_folder
from swlora.locks import lock_folder
from swlora.web.folders import FRESH_S, RunFolders
from swlora.web.pages.runs_view import loss_chart

NASTY = "<img src=x onerror=alert(1)>"
HTML = {"accept": "text/html"}
AT_WORK = {}  # locks by the folders that they are of
# What a file of another version, or of somebody else, may hold
ODD = [None, True, -1, 1e308, 10**39, "x", NASTY, [], [[]], {}, {"x": None}, [None, {}], "😀" * 9]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of runs, which is looked at anew for every request."""
    assert FRESH_S > 0
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)
    return tmp_path / "runs"


def write(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture(autouse=True)
def no_lock_is_left():
    yield
    while AT_WORK:
        AT_WORK.popitem()[1].release()


def take(folder, status):
    """Lock a folder as the process does that works in it."""
    if status == "running":
        if folder not in AT_WORK:
            AT_WORK[folder] = lock_folder(folder)
    elif folder in AT_WORK:
        AT_WORK.pop(folder).release()


def make_run(folder, status="running", n_steps=0, **facts):
    told = {"status": status, "command": "train", "started_at": "2030-01-01T10:00:00Z"}
    write(folder, "run.json", told | facts)
    lines = [
        {
            "step": k,
            "loss": 3 - k / 100,
            "rows": 8 * k,
            "examples_per_s": 24.5,
            "elapsed_s": 2 * k,
        }
        for k in range(1, n_steps + 1)
    ]
    write(folder, "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    take(folder, status)


def kill(folder):
    """Leave it as a process does that is killed."""
    AT_WORK.pop(folder).release()


def look(client, path, status=200):
    response = client.get(path, headers=HTML)
    assert response.status_code == status, response.text
    return response.text


def test_a_run_is_listed_and_shown(make, browse, root):
    make_run(root / "mine", n_steps=50, timings_s={"load_model": 2.0})
    with browse(make(runs=root)) as client:
        listed = look(client, "/runs")
        assert "step 50 · loss 2.500 · 24.5 examples/s" in listed
        assert '<a href="/runs/mine">mine</a>' in listed
        text = look(client, "/runs/mine")
        assert "<svg role=" in text and "From 2.985 at step 1 to 2.505 at step 50." in text
        assert "<dt>loss</dt><dd>2.500</dd>" in text and "held-out" not in text
        assert (">400</dd>" in text and ">100 s</dd>" in text) or "2 min" in text
        assert 'data-live="/runs/mine?part=curve"' in text


def test_only_what_changed_is_sent_again(make, browse, root):
    make_run(root / "mine", n_steps=3)
    with browse(make(runs=root)) as client:
        url = "/runs/mine?part=curve&seen="
        first = client.get(url)
        version = first.headers["x-version"]
        assert f'data-version="{version}"' in look(client, "/runs/mine")
        assert client.get(url + version).status_code == 204
        make_run(root / "mine", n_steps=4)
        second = client.get(url + version)
        assert second.status_code == 200 and second.headers["x-version"] != version
        assert "x-over" not in second.headers
        make_run(root / "mine", "done", n_steps=4)
        assert client.get(url + version).headers["x-over"] == "1"
        assert "data-live" not in look(client, "/runs/mine")
        assert client.get("/runs/mine?part=nothing").status_code == 404
        assert client.get("/runs?part=list").text.count("<tr>") == 2


def test_a_run_that_has_gone_quiet_is_said_to_be(make, browse, root):
    make_run(root / "mine", n_steps=3)
    long_ago_s = time.time() - 3 * 3600
    for path in (root / "mine").iterdir():
        os.utime(path, (long_ago_s, long_ago_s))
    with browse(make(runs=root)) as client:
        assert "silent for 3 h" in look(client, "/runs")
        assert "--resume" in look(client, "/runs/mine")


def test_a_run_whose_process_is_gone_is_not_running(make, browse, root):
    make_run(root / "mine", n_steps=3)
    with browse(make(runs=root)) as client:
        assert client.get("/api/run", params={"name": "mine"}).json()["status"] == "running"
        kill(root / "mine")
        facts = client.get("/api/run", params={"name": "mine"}).json()
        assert facts["status"] == "killed"
        assert client.get("/api/runs").json()["runs"][0]["status"] == "killed"
        for path in ("/runs", "/runs/mine"):
            text = look(client, path)
            assert '<span class="badge bad">killed</span>' in text
            assert "its process is gone" in text
        assert "data-live" not in text or "part=work" in text
        assert "step 3" not in look(client, "/runs")


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(make, browse, root, monkeypatch):
    """Its file says running when it is read, and nobody holds the lock a moment later."""
    make_run(root / "mine", n_steps=3)
    whole = work_folder.is_abandoned

    def ends(folder):
        make_run(folder, "done", 3)
        return whole(folder)

    monkeypatch.setattr(work_folder, "is_abandoned", ends)
    with browse(make(runs=root)) as client:
        text = look(client, "/runs/mine")
        assert "killed" not in text and "data-live" in text  # the next look shows the end
        assert "done</span>" in look(client, "/runs/mine")


def test_of_a_run_on_another_machine_no_lock_is_seen(make, browse, root):
    make_run(root / "mine", n_steps=3, host="elsewhere")
    kill(root / "mine")
    with browse(make(runs=root)) as client:
        assert "running</span>" in look(client, "/runs")


def test_where_there_are_no_locks_a_run_is_what_its_file_says(make, browse, root, monkeypatch):
    make_run(root / "mine", n_steps=3)
    kill(root / "mine")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with browse(make(runs=root)) as client:
        assert "running</span>" in look(client, "/runs")


def test_a_failed_run_says_why(make, browse, root):
    make_run(root / "mine", "failed", reason=f"RunFailedError: {NASTY}")
    with browse(make(runs=root)) as client:
        for path in ("/runs", "/runs/mine"):
            text = look(client, path)
            assert NASTY not in text and NASTY in unescape(text)


def test_the_names_of_folders_are_text(make, browse, root):
    name = "<b>&\"'#?% ü"
    make_run(root / name, "done", n_steps=2)
    with browse(make(runs=root)) as client:
        text = look(client, "/runs")
        assert "<b>" not in text
        (link,) = [part for part in text.split('"') if part.startswith("/runs/")]
        assert name in unescape(look(client, unescape(link)))


def test_odd_files_never_break_a_page(make, browse, root):
    names = ["status", "command", "started_at", "timings_s", "seed", "reason"]
    for number, odd in enumerate(ODD):
        facts = {name: odd for name in names}
        write(root / f"a{number}", "run.json", facts | {"status": "running"})
        write(root / f"b{number}", "run.json", facts | {"status": "done"})
        write(root / f"c{number}", "run.json", facts)
        for kind in "abc":
            folder = root / f"{kind}{number}"
            keys = ("train", "eval", "identify")
            results = [
                dict.fromkeys(keys, odd),
                {k: dict.fromkeys(("layers", "BLEU"), odd) for k in keys},
            ]
            write(folder, "result.json", results[number % 2])
            steps = [
                odd,
                {"step": odd, "loss": odd},
                {"step": 1, "loss": odd},
                {"step": 2, "loss": 2.0},
            ]
            write(folder, "metrics.jsonl", "".join(json.dumps(s) + "\n" for s in steps) + '{"st')
    with browse(make(runs=root)) as client:
        look(client, "/runs")
        look(client, "/super-weights")
        for number in range(len(ODD)):
            for kind in "abc":
                look(client, f"/runs/{kind}{number}")
                look(client, f"/super-weights?run={kind}{number}")


@pytest.mark.parametrize("key", ["modules", "path", "dose_curve", "candidates", "search", "layers"])
def test_odd_identifications_never_break_the_page(make, browse, root, key):
    where = {"layer": 1, "module": "mlp.down_proj", "out_channel": 7, "in_channel": 11}
    found = where | {"weight": 40.0, "ratio": 7.5, "verdict": "strong", "interval": [7.0, 8.0]}
    whole = {"candidates": [found], "layers": [1]}
    write(root / "i", "run.json", {"status": "done", "command": "identify"})
    with browse(make(runs=root)) as client:
        for odd in ODD:
            write(root / "i", "result.json", {"identify": whole | {key: odd}})
            look(client, "/super-weights")
            look(client, "/runs/i")
        write(root / "i", "result.json", {"identify": whole})
        text = look(client, "/super-weights")
        assert "× 7.50" in text and "(7.00 to 8.00)" in text and "strong" in text


def test_the_loss_is_drawn_smoothed_and_beside_held_out_rows():
    rows = [{"step": k, "loss": 2.0 + (k % 2)} for k in range(1, 201)]
    for step, nats in ((50, 1.75), (100, 1.5), (200, 1.625)):
        rows[step - 1]["eval_nll"] = nats
    chart = loss_chart(rows)
    assert [name for _, name in chart.legend] == ["every step", "held-out rows", "smoothed"]
    assert "held-out rows at last 1.625, at best 1.500 at step 100." in chart.description
    held_out = chart.lines[1]
    heights = [y for _, y in held_out.dots]
    assert len(heights) == 3 and heights[1] > heights[2] > heights[0]  # downwards on the page
    assert loss_chart([]) is None
    assert loss_chart([{"step": 1, "loss": 2.0, "eval_nll": None}]) is not None


# Studies


def make_study(folder, status="running", **more):
    runs = {
        "runs/lora/seed-0": {"phase": "runs", "arm": "lora", "label": "seed 0", "status": "done"},
        "runs/super/seed-0": {
            **{"phase": "runs", "arm": "super", "label": "seed 0", "status": "running"}
        },
    }
    arms = {"lora": {"policy": "all", "layers": [0, 1, 2]}, "super": {"policy": "super"}}
    facts = {"status": status, "study": "mine", "arms": arms, "runs": runs}
    write(folder, "study.json", facts | more)
    take(folder, status)
    make_run(folder / "runs/lora/seed-0", "done", 3)
    make_run(folder / "runs/super/seed-0", "running", 5)


def test_a_study_is_listed_once_and_shows_its_runs(make, browse, root):
    make_study(root / "mine")
    make_run(root / "alone", "done")
    with browse(make(runs=root)) as client:
        listed = look(client, "/runs")
        assert "/studies/mine" in listed and "2 arms, 1 run done, 1 running" in listed
        assert "/runs/mine/runs" not in listed and "/runs/alone" in listed
        text = look(client, "/studies/mine")
        assert "/runs/mine/runs/lora/seed-0" in text and "layers 0–2" in text
        assert "step 5" in text and "<svg role=" in text  # the run at work
        assert "No table yet" in text
        board = client.get("/studies/mine?part=board")
        assert (
            client.get("/studies/mine?part=board&seen=" + board.headers["x-version"]).content == b""
        )
        make_study(root / "mine", "done")
        assert client.get("/studies/mine?part=results").headers["x-over"] == "1"


def test_of_a_study_that_was_killed_a_run_may_be_at_work_still(make, browse, root):
    make_study(root / "mine")
    kill(root / "mine")
    with browse(make(runs=root)) as client:
        assert "killed</span>" in look(client, "/runs")
        text = look(client, "/studies/mine")
        assert text.count("killed</span>") == 1 and "running</span>" in text
        kill(root / "mine/runs/super/seed-0")
        text = look(client, "/studies/mine")
        assert text.count("killed</span>") == 2 and "running</span>" not in text
        assert "1 run done, 1 killed" in text
        make_run(root / "mine/runs/super/seed-0", "done", 5)  # after its study was killed
        assert "2 runs done" in look(client, "/studies/mine")


@pytest.mark.parametrize("place", ["../elsewhere", "/tmp", "pipe", "gone"])
def test_a_study_names_no_folder_outside(place, make, browse, root, monkeypatch):
    (root / "mine").mkdir(parents=True)
    os.mkfifo(root / "mine/pipe")
    write(root / "elsewhere", "a", "")
    looked = []
    monkeypatch.setattr("swlora.work_folder.is_abandoned", lambda path: looked.append(path) or True)
    make_study(root / "mine", runs={place: {"arm": "lora", "status": "running"}})
    with browse(make(runs=root)) as client:
        assert "killed</span>" in look(client, "/studies/mine")
    assert all((root / "mine") in (path, *path.parents) for path in looked)
    assert root / "mine/pipe" not in looked


def test_a_study_that_is_the_folder_itself_keeps_its_runs_together(make, browse, root):
    make_study(root)
    with browse(make(runs=root)) as client:
        assert "/studies/runs" in look(client, "/runs")
        text = look(client, "/studies/runs")
        links = set(re.findall(r'href="(/runs/runs/[^"]+)"', text))
        assert links == {"/runs/runs/lora/seed-0", "/runs/runs/super/seed-0"}
        for link in links:
            look(client, link)


def test_an_adapter_of_a_run_that_is_the_folder_itself_has_its_name(runs, monkeypatch):
    monkeypatch.chdir(runs / "second.run")
    found = RunFolders(Path("."))
    assert list(found.adapters()) == list(found.runs()) == ["second.run"]


def test_odd_studies_never_break_a_page(make, browse, root):
    with browse(make(runs=root)) as client:
        for odd in ODD:
            for key in ("status", "arms", "runs", "machine", "reason", "started_at"):
                make_study(root / "mine", **{key: odd})
                look(client, "/runs")
                look(client, "/studies/mine")
            make_study(root / "mine", arms={"a": odd}, runs={"x": odd, "y": {"arm": odd}})
            look(client, "/studies/mine")
            for results in (
                odd,
                {"arms": odd},
                {"arms": [odd]},
                {"arms": [{"name": odd, "seeds": [0]}]},
            ):
                write(root / "mine", "results.json", results)
                look(client, "/studies/mine")


def test_figures_of_studies_are_images_that_may_do_nothing(make, browse, root):
    make_study(root / "mine")
    write(root / "mine", "pareto.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>")
    write(root / "mine", "secret.txt", "SECRET")
    with browse(make(runs=root)) as client:
        assert "/study-figure?name=mine&amp;file=pareto.svg" in look(client, "/studies/mine")
        response = client.get("/study-figure?name=mine&file=pareto.svg")
        assert response.headers["content-type"].startswith("image/svg+xml")
        assert "sandbox" in response.headers["content-security-policy"]
        for name, file in [("mine", "secret.txt"), ("mine", "../x.svg"), ("..", "pareto.svg")]:
            asked = {"name": name, "file": file}
            assert client.get("/study-figure", params=asked).status_code == 404
