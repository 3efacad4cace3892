"""What the page asks for: what there is, runs and their figures, the restaurant form."""

import json
import os
import random
from urllib.parse import quote

import pytest

from swlora.data.examples import Example
from swlora.errors import UserError
from swlora.web.folders import RunFolders
from swlora.web.restaurant import References, meaning_fields, meaning_text


def test_everything_that_may_be_asked_for_is_described(client):
    found = client.get("/api/models").json()
    assert found["base"] == "tiny"
    assert found["adapters"] == [
        {"name": "second.run", "rank": 3, "layers": [1]},
        {"name": "study/first", "rank": 3, "layers": [0, 2]},
    ]
    (weight,) = found["weights"]
    assert (weight["id"], weight["verdict"]) == ("1:mlp.down_proj:7:11", "strong")
    assert found["has_chat"] is True
    assert (found["context_tokens"], found["max_tokens"]) == (512, 400)


def test_runs_are_listed_the_newest_first(client):
    runs = client.get("/api/runs").json()["runs"]
    assert [run["name"] for run in runs] == ["found", "second.run", "study/first"]
    assert runs[1]["status"] == "done"


def test_a_run_tells_what_came_out_without_paths_of_this_machine(client):
    run = client.get("/api/run", params={"name": "found"}).json()
    assert run["result"]["identify"]["figure"] == "spikes.png"
    assert run["figures"] == []
    assert client.get("/api/run", params={"name": "second.run"}).json()["figures"] == ["loss.png"]


def test_metrics_come_from_a_line_on(client):
    def ask(since):
        return client.get("/api/run/metrics", params={"name": "study/first", "since": since}).json()

    assert [row["step"] for row in ask(0)["rows"]] == [0, 1, 2]
    assert ask(2) == {"status": "done", "rows": [{"step": 2, "loss": 1.0}], "next": 3}
    assert ask(3)["rows"] == ask(9)["rows"] == []
    assert ask(9)["next"] == 9


def test_a_figure_is_an_image_that_may_do_nothing(client):
    asked = {"name": "study/first", "file": "loss.png"}
    response = client.get("/api/run/figure", params=asked)
    assert response.content.startswith(b"\x89PNG")
    assert response.headers["content-type"] == "image/png"
    assert "sandbox" in response.headers["content-security-policy"]
    assert "script" not in response.headers["content-security-policy"]


def traversals() -> list[str]:
    """200 names that point elsewhere."""
    parts = ["..", "%2e%2e", "..%2f", "..\\", "%5c", "....//", "\0", "/etc", "C:\\", "\\\\host\\x"]
    parts += ["~", "$HOME", "file:///etc", "x" * 4096, "．．／", "study/first/..", ".", ""]
    pick = random.Random(0)
    names = {"../secret.png", "/etc/passwd", "study/../../secret.png", "link", "link/secret.png"}
    while len(names) < 200:
        chosen = [pick.choice(parts) for _ in range(pick.randint(1, 5))]
        names.add("/".join([*chosen, pick.choice(["secret.png", "loss.png", "", "adapter"])]))
    return sorted(names)


def test_no_name_leads_out_of_the_folder(make, browse, runs, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"SECRET")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/run.json").write_text('{"status": "done", "command": "train"}')
    (tmp_path / "elsewhere/secret.png").write_bytes(b"SECRET")
    (root / "mine").mkdir()
    (root / "mine/run.json").write_text('{"status": "done", "command": "train"}')
    os.symlink(tmp_path / "elsewhere", root / "link")
    os.symlink(tmp_path / "secret.png", root / "mine/secret.png")
    with browse(make(runs=root)) as client:
        assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["mine"]
        for name in traversals():
            for path, params in [
                ("/api/run", {"name": name}),
                ("/api/run/metrics", {"name": name}),
                ("/api/run/figure", {"name": name, "file": "secret.png"}),
                ("/api/run/figure", {"name": "mine", "file": name}),
                ("/v1/models/" + quote(name, safe=""), {}),
            ]:
                response = client.get(path, params=params)
                assert 400 <= response.status_code < 500, (path, name)
                assert b"SECRET" not in response.content
            body = {"prompt": "Hi", "sides": [{"model": name}]}
            assert 400 <= client.post("/api/generate", json=body).status_code < 500
        assert client.get("/api/run", params={"name": "mine"}).json()["figures"] == []
        asked = {"name": "mine", "file": "secret.png"}  # a link in a run that is there
        linked = client.get("/api/run/figure", params=asked)
        assert linked.status_code == 404 and b"SECRET" not in linked.content


def test_a_folder_that_is_not_there_yet_holds_nothing(make, browse, tmp_path, monkeypatch):
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)
    with browse(make(runs=tmp_path / "later")) as client:
        assert client.get("/api/runs").json() == {"runs": []}
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        (tmp_path / "later/run").mkdir(parents=True)
        (tmp_path / "later/run/run.json").write_text('{"status": "running", "command": "train"}')
        assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["run"]


def test_a_run_that_is_torn_is_left_out(make, browse, tmp_path):
    for name, content in {"a": "{", "b": "[]", "c": '{"status": 1}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    with browse(make(runs=tmp_path)) as client:
        assert client.get("/api/runs").json() == {"runs": []}
        for path in ("/api/run", "/api/run/metrics"):
            assert client.get(path, params={"name": "a"}).status_code == 404


def test_the_walk_is_bounded(tmp_path, monkeypatch):
    run = '{"status": "done", "command": "train"}'
    monkeypatch.setattr("swlora.web.folders.MAX_FOLDERS", 10)
    for i in range(30):
        (tmp_path / f"{i:02}").mkdir()
        (tmp_path / f"{i:02}/run.json").write_text(run)
    assert len(RunFolders(tmp_path).runs()) == 9
    deep = tmp_path / "/".join("abcdefgh")
    deep.mkdir(parents=True)
    (deep / "run.json").write_text(run)
    monkeypatch.setattr("swlora.web.folders.MAX_FOLDERS", 100)
    assert len(RunFolders(tmp_path).runs()) == 30


# The restaurant form


def test_fields_become_a_meaning_representation_in_the_datas_order():
    fields = {"area": "riverside", "name": " The  Vaults ", "food": "", "near": "Café Rouge"}
    assert meaning_text(fields) == "name[The Vaults], area[riverside], near[Café Rouge]"
    assert meaning_fields("name[The Vaults], area[riverside]") == {
        "name": "The Vaults",
        "area": "riverside",
    }


@pytest.mark.parametrize("text", ["no meaning", "name[a", "name]a[", "a, b", "name[a] area[b]", ""])
def test_other_text_is_no_meaning_representation(text):
    assert meaning_fields(text) == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {},
        {"stars": "5"},
        {"name": "a] area[b"},
        {"name": "x" * 101},
        {"name": "a\x00b"},
    ],
)
def test_what_is_no_restaurant_is_refused(client, fields):
    with pytest.raises(UserError):
        meaning_text(fields)
    response = client.post("/api/restaurant", json={"fields": fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "fields")


MEANINGS = [
    ("name[Aromi], area[riverside]", "Aromi is by the river."),
    ("name[Aromi], area[riverside]", "By the river lies Aromi."),
    ("area[riverside], name[Aromi]", "By the river lies Aromi."),
    ("name[Zizzi], area[city, centre]", "Zizzi is central."),
]


def test_references_are_found_whatever_the_order_of_the_fields():
    references = References([Example(mr, text) for mr, text in MEANINGS])
    expected = ["Aromi is by the river.", "By the river lies Aromi."]
    assert references.find("area[riverside], name[Aromi]") == expected
    assert references.find("name[Aromi]") == []
    assert references.find("what?") == []
    assert references.values["name"] == ["Aromi", "Zizzi"]
    assert references.values["area"] == ["riverside", "city, centre"]
    with pytest.raises(UserError, match="no meaning representations"):
        References([Example("a question", "an answer")])


def test_the_form_tells_fields_values_and_references(client, browse):
    from dataclasses import replace

    found = client.get("/api/restaurant").json()
    assert [field["name"] for field in found["fields"]][:3] == ["name", "eatType", "food"]
    assert found["has_references"] is False
    asked = {"fields": {"name": "Aromi", "area": "riverside"}}
    answer = client.post("/api/restaurant", json=asked).json()
    assert answer == {"prompt": "name[Aromi], area[riverside]", "references": None}

    app = client.app.app
    references = References([Example(mr, text) for mr, text in MEANINGS])
    app.state.service = replace(app.state.service, references=references)
    assert client.get("/api/restaurant").json()["fields"][0]["values"] == ["Aromi", "Zizzi"]
    assert len(client.post("/api/restaurant", json=asked).json()["references"]) == 2


def test_real_data_have_references(shared_dir):
    from swlora.config import DataSpec
    from swlora.data.sources import load_dataset

    dataset = load_dataset(DataSpec(name=str(shared_dir / "e2e-dataset")))
    references = References.of(dataset)
    example = dataset.dev[0]
    assert example.completion in references.find(example.prompt)
    fields = meaning_fields(example.prompt)
    assert example.completion in references.find(meaning_text(fields))
    assert json.dumps(references.values)
    assert all(references.values.values())
