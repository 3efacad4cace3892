"""What comes from the Hub is plain data, as the Hub says it is, in a folder complete or absent."""

import hashlib
import json

import httpx2
import pytest
from tests.support.hub_stand_in import TOKEN, Answer, HubStandIn, Repository

REPO = "mary/model"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "README.md": b"# Mary's",
    "LICENSE": b"MIT",
    "tuned-q8_0.gguf": b"GGUF",
}
OTHERS = {
    **dict.fromkeys(("pytorch_model.bin", "optimizer.pt", "modeling_mary.py", "x.pkl"), b"no"),
    **dict.fromkeys(("data/train.json", ".hidden.json", "run.sh", "odd name.json"), b"no"),
}


@pytest.fixture
def mary(stand_in: HubStandIn) -> HubStandIn:
    """The Hub with a model of two commits, the second a branch's."""
    repository = stand_in.repositories[REPO] = Repository()
    for name in ("model.safetensors", "tuned-q8_0.gguf"):
        stand_in.large[hashlib.sha256(FILES[name]).hexdigest()] = FILES[name]
    repository.commit("main", {**FILES, **OTHERS, ".gitattributes": b""}, "all")
    repository.branches["next"] = repository.branches["main"]
    repository.commit("next", {"merges.txt": b"b c"}, "other merges")
    return stand_in


def test_plain_data_is_taken_and_nothing_else(mary, swlora, tmp_path):
    done = swlora("pull", REPO, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    commit = mary.repositories[REPO].branches["main"]
    taken = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    record = json.loads(taken.pop("swlora-pull.json"))
    assert taken == FILES
    assert record == {
        "repo": REPO,
        "revision": None,
        "commit": commit,
        "kind": "model",
        "n_bytes": {name: len(content) for name, content in sorted(FILES.items())},
        "left_out": sorted(OTHERS),
    }
    assert f"model of {REPO} at {commit}" in done.out
    assert "8 files" in done.out and f"left out: {', '.join(sorted(OTHERS))}" in done.out
    assert TOKEN not in done.out + done.err
    assert not any(name in asked for asked in mary.requests for name in OTHERS)


def test_a_revision_is_a_commit_for_good(mary, swlora, tmp_path):
    assert swlora("pull", REPO, "--revision", "next", "--output", tmp_path / "out").code == 0
    assert (tmp_path / "out/merges.txt").read_bytes() == b"b c"
    record = json.loads((tmp_path / "out/swlora-pull.json").read_text())
    assert record["commit"] == mary.repositories[REPO].branches["next"]
    assert record["revision"] == "next"
    resolved = [asked for asked in mary.requests if "/resolve/" in asked]
    assert resolved and all(record["commit"] in asked for asked in resolved)


def refuse(status: int, **headers: str):
    return lambda _: Answer(status, json={"error": "no"}, headers=headers)


def broken(request: httpx2.Request) -> Answer:
    raise httpx2.ReadError("Connection reset by peer")


def cut(request: httpx2.Request) -> Answer:
    if request.method == "GET":
        return Answer(200, content=FILES["model.safetensors"][:50])
    return Answer(200)


def changed(request: httpx2.Request) -> Answer:
    return Answer(200, content=b"x" * len(FILES["model.safetensors"]))


def altered(request: httpx2.Request) -> Answer:
    return Answer(200, content=b"x y")  # of the same length


GATED = {"X-Error-Code": "GatedRepo"}
INFO = "^GET /api/models/"


@pytest.mark.parametrize(
    ("where", "answer", "code", "said"),
    [
        (INFO, refuse(401, **{"X-Error-Code": "RepoNotFound"}), 2, "no model mary/model on"),
        (INFO, refuse(404, **{"X-Error-Code": "RepoNotFound"}), 2, "no model mary/model on"),
        (INFO, refuse(404, **{"X-Error-Code": "RevisionNotFound"}), 2, "has no revision main"),
        (INFO, refuse(403, **GATED), 2, "mary/model is gated: ask for access"),
        ("/resolve/.*/config.json", refuse(403, **GATED), 2, "mary/model is gated"),
        ("/resolve/.*/config.json", refuse(403), 2, "this login may not read mary/model"),
        (INFO, refuse(500), 1, "the Hub failed (status 500)"),
        ("/large/", refuse(500), 1, "the Hub failed (status 500)"),
        (INFO, broken, 1, "the connection to the Hub broke"),
        ("/resolve/", broken, 1, "the connection to the Hub broke"),
        ("/large/", broken, 1, "the connection to the Hub broke"),
        ("^GET /large/", cut, 1, "run it again"),
        ("^GET /large/", changed, 1, "model.safetensors of mary/model came other than the Hub"),
        ("^GET /.*/resolve/.*/merges.txt", altered, 1, "merges.txt of mary/model came other than"),
    ],
)
def test_what_fails_is_one_line_and_leaves_no_folder(
    where, answer, code, said, mary, swlora, tmp_path
):
    mary.fail(where, answer)
    done = swlora("pull", REPO, "--output", tmp_path / "new/out")
    assert (done.code, done.out) == (code, ""), done
    (line,) = done.err.splitlines()
    assert line.startswith("swlora: ") and said in line
    assert TOKEN not in line and "https://" not in line
    assert not any((tmp_path / "new").glob("*")), "nothing half-written, under no name"


def test_a_folder_that_holds_something_is_not_touched(mary, swlora, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert "is in use" in swlora("pull", REPO, "--output", tmp_path / "out").mistake
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert mary.requests == []


def test_what_is_too_large_is_refused_before_it_is_taken(mary, swlora, tmp_path, monkeypatch):
    out = ("--output", tmp_path / "out")
    assert (
        "more than --max-gb 1e-07; give more"
        in swlora("pull", REPO, *out, "--max-gb", 1e-7).mistake
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    said = swlora("pull", REPO, *out).mistake
    assert f"files of {REPO}), and its disk has 10 bytes free; choose another --output" in said
    assert not any("/resolve/" in asked for asked in mary.requests)


def test_pickles_alone_are_nothing_to_take(mary, swlora, tmp_path):
    only = {"config.json": b"{}", "pytorch_model.bin": b"no"}
    mary.repositories["mary/old"] = Repository()
    mary.repositories["mary/old"].commit("main", only, "pickles")
    mistake = swlora("pull", "mary/old", "--output", tmp_path / "out").mistake
    assert "neither a model nor an adapter in safetensors, nor GGUF files" in mistake
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(mary, swlora, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    done = swlora("pull", REPO, "--output", tmp_path / "new/out")
    assert done.code == 1 and "No space left on device" in done.err
    assert not any((tmp_path / "new").glob("*"))
