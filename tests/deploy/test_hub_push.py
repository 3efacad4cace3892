"""What is published is whole and nothing but the model; the Hub has all of it or nothing."""

import json
import re
from pathlib import Path

import httpx2
import pytest
import yaml
from huggingface_hub import ModelCard
from tests.support.hub_stand_in import TOKEN, Answer, HubStandIn, Repository

from swlora.adapters.saved import load_adapter
from swlora.cli.disk import size

REPO = "mary/my-lora"


def files_of(stand_in: HubStandIn, branch: str = "main") -> dict[str, bytes]:
    found = stand_in.repositories[REPO].files(branch)
    assert found is not None
    return found[1]


def test_an_adapter_is_published_whole_in_one_commit(stand_in, swlora, adapter):
    stray = {"checkpoint": None, "metrics.jsonl": "{}", "pytorch_model.bin": "x", "train.csv": "a"}
    for name, text in stray.items():
        (adapter / name).mkdir() if text is None else (adapter / name).write_text(text)
    done = swlora("push", "--adapter", adapter, "--repo", REPO, "--private")
    assert done.code == 0, done.err
    assert "left out: checkpoint/, metrics.jsonl, pytorch_model.bin, train.csv\n" in done.out
    repository = stand_in.repositories[REPO]
    assert repository.private
    assert repository.messages == ["The adapter, published with swlora"]
    there = files_of(stand_in)
    assert there == {p.name: p.read_bytes() for p in adapter.iterdir() if p.name not in stray}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(there)
    assert f"commit on main: {repository.branches['main']}" in done.out
    assert TOKEN not in done.out + done.err
    assert stand_in.tokens == {f"Bearer {TOKEN}", None}  # None: is it there?


def test_what_was_published_comes_back_bit_for_bit(stand_in, swlora, adapter, make_model, tmp_path):
    assert swlora("push", "--adapter", adapter, "--repo", REPO).code == 0
    done = swlora("pull", REPO, "--output", tmp_path / "new/back")
    assert done.code == 0, done.err
    back = tmp_path / "new/back"
    record = json.loads((back / "swlora-pull.json").read_text())
    commit = stand_in.repositories[REPO].branches["main"]
    assert (record["repo"], record["commit"], record["revision"]) == (REPO, commit, None)
    for path in adapter.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
        assert record["n_bytes"][path.name] == path.stat().st_size
    assert {p.name for p in back.iterdir()} == {p.name for p in adapter.iterdir()} | {
        "swlora-pull.json"
    }
    load_adapter(make_model("llama"), back)


def test_a_merged_model_goes_with_its_shards_and_gguf_files(stand_in, swlora, merged):
    done = swlora("push", "--model", merged, "--repo", REPO, "--revision", "v2", "--message", "new")
    assert done.code == 0, done.err
    repository = stand_in.repositories[REPO]
    assert repository.messages == ["new"]
    assert files_of(stand_in, "main") == {}
    there = files_of(stand_in, "v2")
    assert there == {path.name: path.read_bytes() for path in merged.iterdir()}
    assert not repository.private


def test_a_dry_run_lists_sizes_and_sends_and_writes_nothing(stand_in, swlora, adapter):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    done = swlora("push", "--adapter", adapter, "--repo", REPO, "--dry-run", "--license", "mit")
    assert done.code == 0
    listed = dict(re.findall(r"^(\S+) {2,}(\S.*)$", done.out, flags=re.MULTILINE))
    for name, content in before.items():
        if name != "README.md":  # the licence is new
            assert listed[name] == size(len(content))
    assert "license: mit" in done.out
    assert stand_in.requests == []
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is damaged"),
        (lambda f: next(f.glob("model-00002*")).unlink(), "lacks model-00002"),
        (lambda f: next(f.glob("model-00002*")).write_bytes(b"\0" * 100), "cannot be read as safe"),
        (lambda f: (f / "config.json").write_text("["), "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json; `swlora merge`"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], None),
        (lambda f: (f / "tune.gguf").write_bytes(b"GGUF"), "cannot be read as a GGUF"),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "metadata at the top of"),
        (
            lambda f: (f / "generation_config.json").write_text(json.dumps({"of": str(f)})),
            "names a folder of this machine",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_sent(
    damage, said, stand_in, swlora, merged
):
    damage(merged)
    if said is None:
        (merged / "chat_template.jinja").unlink()
        said = "holds no tokenizer"
    assert said in swlora("push", "--model", merged, "--repo", REPO).mistake
    assert stand_in.requests == []


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "x.gguf.report.json"])
def test_a_link_out_of_the_folder_is_not_followed(stand_in, swlora, merged, tmp_path, name):
    """It may lead to what nobody wants to publish; the folder may be somebody else's."""
    (tmp_path / "private.json").write_text('{"secret": 1}')
    (merged / name).unlink(missing_ok=True)
    (merged / name).symlink_to(tmp_path / "private.json")
    assert (
        "is a link out of its folder" in swlora("push", "--model", merged, "--repo", REPO).mistake
    )
    assert stand_in.requests == []


def test_other_formats_are_no_weights(stand_in, swlora, merged):
    for path in merged.glob("*.safetensors*"):
        path.unlink()
    (merged / "pytorch_model.bin").write_bytes(b"pickle")
    mistake = swlora("push", "--model", merged, "--repo", REPO).mistake
    assert (
        "holds neither model.safetensors nor model.safetensors.index.json; other formats" in mistake
    )


def test_an_index_that_names_tensors_of_no_file_is_refused(stand_in, swlora, merged):
    index = merged / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["model.more.weight"] = next(iter(tree["weight_map"].values()))
    index.write_text(json.dumps(tree))
    mistake = swlora("push", "--model", merged, "--repo", REPO).mistake
    assert "lacks model.more.weight, which model.safetensors.index.json says is in it" in mistake


def refuse(status: int, **headers: str):
    return lambda _: Answer(status, json={"error": "no"}, headers=headers)


def broken(request: httpx2.Request) -> Answer:
    raise httpx2.ReadError("Connection reset by peer")


COMMIT, UPLOAD = "/commit/", "^PUT /large/"


@pytest.mark.parametrize(
    ("where", "answer", "code", "said"),
    [
        ("/repos/create", refuse(401), 2, "does not take this machine's login; `hf auth login`"),
        ("/repos/create", refuse(403), 2, "this login may not write to mary/my-lora"),
        ("/preupload/", refuse(403), 2, "this login may not write to mary/my-lora"),
        ("/preupload/", refuse(404), 2, "has nothing there for mary/my-lora"),
        (COMMIT, refuse(409), 1, "was changed at the same time; run it again"),
        (COMMIT, refuse(429), 1, "takes no more requests"),
        (COMMIT, refuse(500), 1, "the Hub failed (status 500); run it again later"),
        (UPLOAD, refuse(500), 1, "the Hub failed (status 500); run it again later"),
        (UPLOAD, refuse(403), 2, "this login may not write"),
        (UPLOAD, broken, 1, "the connection to the Hub broke"),
        (COMMIT, broken, 1, "nothing was published, run it again"),
        ("info/lfs", broken, 1, "the connection to the Hub broke"),
    ],
)
def test_what_fails_is_one_line_and_publishes_nothing(
    where, answer, code, said, stand_in, swlora, adapter
):
    stand_in.fail(where, answer)
    done = swlora("push", "--adapter", adapter, "--repo", REPO)
    assert done.code == code, done
    (line,) = done.err.splitlines()
    assert line.startswith("swlora: ") and said in line
    assert TOKEN not in line and "https://" not in line
    assert not stand_in.repositories or files_of(stand_in) == {}
    stand_in._faults.clear()
    assert swlora("push", "--adapter", adapter, "--repo", REPO).code == 0
    assert files_of(stand_in).keys() == {path.name for path in adapter.iterdir()}


def test_private_is_not_taken_for_a_repository_that_is_public(stand_in, swlora, adapter):
    stand_in.repositories[REPO] = Repository()
    mistake = swlora("push", "--adapter", adapter, "--repo", REPO, "--private")
    assert mistake.code == 2
    assert "exists and is public, and --private makes new ones only" in mistake.err
    assert files_of(stand_in) == {}


def test_mistakes_cost_no_request(stand_in, swlora, adapter, merged, monkeypatch, tmp_path):
    to = ("--repo", REPO)
    for name in ("mary", "a/b/c", "mary/", "-x/y", "mary/my lora"):
        assert "OWNER/NAME" in (
            said := swlora("push", "--adapter", adapter, "--repo", name).mistake
        ) or ("no name of a repository" in said)
    assert "only one of them" in swlora("push", *to).mistake
    assert (
        "only one of them" in swlora("push", "--adapter", adapter, "--model", merged, *to).mistake
    )
    assert "no adapter folder" in swlora("push", "--adapter", tmp_path / "none", *to).mistake
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE keeps" in swlora("push", "--adapter", adapter, *to).err
    assert stand_in.requests == []


def test_without_a_login_nothing_is_asked_for_but_whether_the_hub_is_there(
    stand_in, swlora, adapter, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    done = swlora("push", "--adapter", adapter, "--repo", REPO)
    assert (done.code, stand_in.requests) == (2, ["HEAD /"])
    assert "there is no login for the Hub on this machine; `hf auth login` logs in" in done.err


def test_a_card_that_a_person_changed_is_published_as_it_is(stand_in, swlora, adapter):
    own = (adapter / "README.md").read_text().replace("## Use", "## How I use it")
    (adapter / "README.md").write_text(own)
    mistake = swlora("push", "--adapter", adapter, "--repo", REPO, "--license", "mit").mistake
    assert "was changed by hand and is published as it is" in mistake
    assert swlora("push", "--adapter", adapter, "--repo", REPO).code == 0
    assert files_of(stand_in)["README.md"].decode() == own


def test_the_card_says_what_is_known_in_metadata_that_the_hub_reads(stand_in, swlora, adapter):
    assert swlora("push", "--adapter", adapter, "--repo", REPO).code == 0
    text = files_of(stand_in)["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.library_name) == ("mary/tiny", "peft")
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    assert swlora("push", "--adapter", adapter, "--repo", REPO, "--license", "mit").code == 0
    assert ModelCard(files_of(stand_in)["README.md"].decode()).data.license == "mit"
    assert (adapter / "README.md").read_bytes() == files_of(stand_in)["README.md"]


def test_a_repository_may_not_be_written_from_outside_the_folder(stand_in, swlora, merged):
    index = merged / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"] = dict.fromkeys(tree["weight_map"], "../adapter/adapter_model.safetensors")
    index.write_text(json.dumps(tree))
    mistake = swlora("push", "--model", merged, "--repo", REPO).mistake
    assert "which is no safetensors file beside it" in mistake
    assert Path(index).is_file()
