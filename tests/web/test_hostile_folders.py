"""Folders under --runs that hold anything at all: they are named, and every other route answers."""

import json

import pytest
from tests.support.hostile_folders import KINDS, ROUTES, make_folder, spoiled_folders, wrong_answers

from swlora.web.pages import runs_view


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def check_routes(client, paths, statuses, *, pages):
    headers = {"accept": "text/html"} if pages else {}
    for path in paths:
        response = client.get(path, headers=headers)
        assert response.status_code in statuses, (path, response.text)


def test_bad_folders_cost_nothing_but_themselves(make, browse, root):
    bad = spoiled_folders(root)
    with browse(make(runs=root)) as client:
        assert [wrong for wrong in wrong_answers(client, bad) if wrong] == []
        listed = client.get("/runs", headers={"accept": "text/html"}).text
        refused = client.get("/api/models").json()["not_served"]
        reasons = {adapter["name"]: adapter["reason"] for adapter in refused}
        for name, (file, kind) in bad.items():
            if file in ("run.json", "study.json") and kind != "folder":
                page = f"/{'runs' if file == 'run.json' else 'studies'}/{name}"
                check_routes(client, [page], {404}, pages=True)
            if file in ("adapter_config.json", "swlora.json") and kind != "folder":
                assert file in reasons[name] and str(root) not in reasons[name]
        n_unreadable = 2 * (len(KINDS) - 1)  # a folder called run.json is no file of that name
        assert f"and {n_unreadable - 10} more" in listed and "cannot be read: " in listed
        assert "good" in {run["name"] for run in client.get("/api/runs").json()["runs"]}


def test_what_is_bad_is_said_once_in_the_log(make, browse, root, caplog, monkeypatch):
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)
    (make_folder(root / "bad") / "run.json").write_text("[1, 2]")
    with browse(make(runs=root)) as client:
        for _ in range(3):
            client.get("/runs", headers={"accept": "text/html"})
    said = [r.getMessage() for r in caplog.records if "is not shown" in r.getMessage()]
    assert said == ["bad is not shown: bad holds no readable run.json: it holds no JSON object"]


def test_an_unforeseen_error_costs_nothing_but_its_folder(make, browse, root, monkeypatch):
    make_folder(root / "good")
    (make_folder(root / "bad") / "study.json").unlink()
    whole = runs_view._headline

    def fail(entry, *given):
        if entry.name == "bad":
            raise LookupError("a mistake of ours")
        return whole(entry, *given)

    monkeypatch.setattr(runs_view, "_headline", fail)
    with browse(make(runs=root)) as client:
        check_routes(client, ROUTES, {200}, pages=True)
        assert "cannot be read: bad." in client.get("/runs", headers={"accept": "text/html"}).text


def test_a_long_training_is_thinned_and_its_curve_answered_in_parts(make, browse, root):
    folder = make_folder(root / "good")
    lines = [{"step": k, "loss": 2.0} for k in range(45_000)]
    lines[7]["eval_nll"] = 1.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with browse(make(runs=root)) as client:
        page = client.get("/runs/good", headers={"accept": "text/html"}).text
        assert "at step 44999" in page and "On held-out rows at last 1.500" in page
        found, since = [], 0
        while rows := client.get(f"/api/run/metrics?name=good&since={since}").json()["rows"]:
            assert len(rows) <= 20_000
            found += rows
            since = len(found)
        assert found == lines
