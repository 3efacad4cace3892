"""Trainings from the page: whether, by whom, and what a request may name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.data_files import write_rows
from tests.support.page_reading import look
from tests.support.page_training import ROWS, start

from swlora.config import RunSpec, ServeSpec
from swlora.errors import UserError
from swlora.web.guard import MAX_BODY_BYTES, Policy
from swlora.web.training.allowed import check_allowed
from swlora.web.training.data_folder import MAX_FILES, DataFolder

KEY = "a-key-of-sixteen-or-more"


# Whether it may train at all


def test_a_server_trains_only_where_that_was_asked_for(client):
    for method, path in (("get", "/train"), ("get", "/train/with"), ("post", "/train/start")):
        more: dict[str, Any] = {"data": {"data": "rows.jsonl"}} if method == "post" else {}
        answer = getattr(client, method)(path, **more)
        assert answer.status_code == 404 and "--allow-training" in answer.text
    assert "/train" not in [link.get("href") for link in look(client, "/runs").all("a")]


@pytest.mark.parametrize(
    ("settings", "has_key", "said"),
    [
        ({"allowed_hosts": ["example.org"]}, False, "needs a key"),
        ({"cors_origins": ["https://example.org"]}, False, "needs a key"),
        ({"allowed_hosts": ["example.org"]}, True, ""),
        ({"data_folder": "nowhere"}, False, "no folder nowhere"),
        ({"runs": __file__}, False, "is a file"),
        ({"runs": ".", "data_folder": "."}, False, "one folder"),
        ({}, False, ""),
    ],
)
def test_what_a_server_that_trains_needs(settings, has_key, said, tmp_path):
    given = {"allow_training": True, "data_folder": tmp_path, "runs": "runs"} | settings
    try:
        check_allowed(ServeSpec(**given), has_key=has_key)
    except UserError as error:
        assert said and said in str(error)
    else:
        assert not said


def test_it_listens_to_other_machines_with_a_key_only(tmp_path):
    from swlora.progress import Silent
    from swlora.web.server import serve

    spec = ServeSpec(host="0.0.0.0", allow_training=True, data_folder=tmp_path)
    with pytest.raises(UserError, match="SWLORA_API_KEY"):
        serve(RunSpec(serve=spec), Silent)


@pytest.mark.parametrize("given", [{"allow_training": True}, {"data_folder": "data"}])
def test_the_flags_go_together(given):
    with pytest.raises(ValueError, match="--allow-training"):
        ServeSpec(**given)


def test_who_has_no_key_or_comes_from_another_site_is_refused(open_app, child):
    keyed = open_app(Policy.of("127.0.0.1", KEY, cors_origins=["https://example.org"]))
    assert keyed.get("/train").status_code == 401
    assert start(keyed, 401)
    keyed.headers["authorization"] = f"Bearer {KEY}"
    for headers in (
        {"origin": "https://example.org"},  # which may use the API, and no more
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
    ):
        for action in ("look", "start", "stop", "resume", "merge"):
            answer = keyed.post(f"/train/{action}", data={"run": "mine"}, headers=headers)
            assert answer.status_code == 403, action
    assert not child.exists()


# What may be named


def test_only_plain_files_of_the_folder_are_listed(trainer, data, tmp_path):
    page = look(trainer, "/train")
    chosen = [field["value"] for field in page.all("input") if field.get("name") == "data"]
    assert chosen == ["rows.jsonl", "more/broken.jsonl"]
    assert str(tmp_path) not in page.text
    shutil.rmtree(data)
    data.mkdir()
    assert "No data are here yet" in look(trainer, "/train").text


def test_the_list_is_bounded(tmp_path):
    for k in range(MAX_FILES + 5):
        (tmp_path / f"{k:04}.txt").write_text("text")
    folder = DataFolder(tmp_path, tmp_path / "runs")
    assert len(folder.files()) == MAX_FILES and not folder.is_whole


def test_the_runs_are_left_out(tmp_path):
    for name in ("own.jsonl", "runs/top.jsonl", "runs/mine/predictions.jsonl"):
        write_rows(tmp_path / name, ROWS)
    assert list(DataFolder(tmp_path, tmp_path / "runs").files()) == ["own.jsonl"]


def test_e2e_data_are_one_choice(tmp_path):
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (tmp_path / "e2e").mkdir(exist_ok=True)
        (tmp_path / "e2e" / name).write_text("mr,ref\n")
    assert [
        (f.name, f.is_e2e) for f in DataFolder(tmp_path, tmp_path / "runs").files().values()
    ] == [("e2e/", True)]


STRANGE_NAMES = [
    *("", ".", "..", "../outside.jsonl", "more/../rows.jsonl", "/etc/passwd", "./rows.jsonl"),
    *("link.jsonl", "elsewhere/outside.jsonl", ".hidden.jsonl", "notes.md", "folder.jsonl"),
    *("rows.jsonl\x00", "rows.jsonl ", "~/rows.jsonl", "*.jsonl", "--model=x", "x" * 10_000),
]


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_data_that_were_not_listed_are_not_there(trainer, child, name, tmp_path):
    assert start(trainer, 404, data=name)
    assert trainer.post("/train/look", data={"data": name}).status_code == 404
    assert trainer.get("/train/with", params={"data": name}).status_code in (400, 404)
    assert not child.exists() and list((tmp_path / "runs").iterdir()) == []


def test_a_run_is_not_called_as_the_model_that_is_served(trainer, child, data, loaded):
    """By that name clients ask for the base model."""
    name = Path(loaded.name).name
    assert f"the model that is served is called {name}" in start(trainer, 400, name=name)
    assert not child.exists()
    write_rows(data / f"{name}.jsonl", ROWS)
    page = look(trainer, f"/train/with?data={name}.jsonl")
    assert [field["value"] for field in page.all("input") if field.get("name") == "name"] == [
        f"{name}-2"
    ]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../mine", "a/b", "/tmp/mine", "-x", ".x", "x" * 65, "a b", "é", "a\nb"]
)
def test_a_run_has_a_plain_name(trainer, child, name, tmp_path):
    assert "Name of the run: letters" in start(trainer, 400, name=name)
    assert not child.exists() and list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": "0"}, "Rank: "),
        ({"rank": "many"}, "Rank: "),
        ({"epochs": "1001"}, "1,000 epochs"),
        ({"epochs": "9" * 300}, "1,000 epochs"),
        ({"epochs": "1e9"}, "Epochs: "),
        ({"max_steps": "-1"}, "Steps at most: "),
        ({"learning_rate": "nan"}, "Learning rate: "),
        ({"learning_rate": "inf"}, "Learning rate: "),
        ({"eval_share": "1"}, "Held-out share: "),
        ({"layers": "--resume"}, "Layers: "),
        ({"layers": "last:0"}, "Layers: "),
        ({"layers": "2," * 500}, "300 characters"),
        ({"method": "full"}, "Method: one of"),
        ({"columns": "prompt"}, "Columns: "),
        (
            {"find_learning_rate": "1", "learning_rate": "1e-3"},
            "Find the learning rate tries rates, and Learning rate is set already",
        ),
        ({"find_learning_rate": "1", "method": "pissa"}, "dora, and not Method pissa"),
        ({"layers": "0,99"}, "layer 99 does not exist; this model has layers 0 to "),
        ({"layers": "last:99"}, "Layers last:99: K must be from 1 to "),
    ],
)
def test_wrong_settings_are_named_on_the_form_and_nothing_begins(
    trainer, child, fields, said, tmp_path
):
    text = start(trainer, 400, **fields)
    assert said in text and 'value="mine"' in text
    assert not child.exists() and list((tmp_path / "runs").iterdir()) == []


def test_a_form_that_is_too_large_is_refused(trainer, child):
    body = b"data=" + b"x" * MAX_BODY_BYTES
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert trainer.post("/train/start", content=body, headers=form).status_code == 413
    many = "&".join(f"f{k}=1" for k in range(500)).encode()
    assert trainer.post("/train/start", content=many, headers=form).status_code == 400
    assert trainer.post("/train/start", json={"data": "rows.jsonl"}).status_code == 415
    assert not child.exists()
