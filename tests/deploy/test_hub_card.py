"""The card of what is published tells of the run that made it, and of no folder of this machine."""

import json
import re
import shlex
import shutil

import gguf
import pytest
import typer
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swlora.cli.app import app
from swlora.config import RunSpec, load_spec
from swlora.deploy.hub_files import Contents
from swlora.deploy.run_notes import command_of, training_sections
from swlora.deploy.scored import check_scored
from swlora.errors import UserError
from swlora.files import write_json

REPO = ("--repo", "mary/mine")


def code_blocks(card: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)\n```$", card, flags=re.DOTALL | re.MULTILINE)


def test_a_runs_card_has_its_command_timings_and_scores(small, swlora, tmp_path):
    flags = ("--layers", "1,2", "--eval-prompts", 2, "--max-new-tokens", 4, "--eval-split", "dev")
    done = swlora("train-eval", *small, *flags[:-2], "--output", "run")
    assert done.code == 0, done.err
    printed = done.out[done.out.index("NLL ") : done.out.index("predictions:")].strip()
    pushed = swlora("push", "--adapter", "run", *REPO, "--dry-run")
    card = pushed.out[pushed.out.index("\n---\n") + 1 : pushed.out.index("nothing was sent")]
    assert str(tmp_path) not in card
    (command,) = [code for code in code_blocks(card) if code.startswith("swlora train-eval")]
    assert "--dataset rows.jsonl" in command and "--layers 1,2" in command
    verb, *words = shlex.split(command)[1:]
    parser = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    parser.make_context(verb, words)
    assert any(printed in code for code in code_blocks(card))
    assert re.search(r"^On the dev split of rows.jsonl: \d+ prompts?, \d+ rows?\.$", card, re.M)
    assert "examples/s in training" in card
    assert "Licence of the data: unknown: fill in" in card
    assert ModelCard(card).data.library_name == "peft"


def test_a_card_that_is_no_text_is_told(swlora, adapter):
    (adapter / "README.md").write_bytes(b"\xff\xfe")
    said = swlora("push", "--adapter", adapter, *REPO, "--dry-run").mistake
    assert "cannot read" in said and "README.md: it is no UTF-8 text" in said


def test_super_weights_that_cannot_be_read_are_told(tmp_path):
    write_json(tmp_path / "result.json", {"identify": {"candidates": 3}})
    write_json(tmp_path / "run.json", {"command": "identify", "status": "done"})
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match=r"result\.json holds no readable super weights"):
        list(training_sections(tmp_path))


def test_scores_may_come_from_another_run_and_are_not_those_of_best(
    small, swlora, adapter, make_model, tmp_path
):
    assert (
        "no scores: give --scores"
        in swlora("push", "--adapter", adapter, *REPO, "--dry-run", "--scores", adapter).mistake
    )
    settings = (*small[:6], "--eval-prompts", 2, "--max-new-tokens", 4)
    done = swlora("eval", *settings, "--adapter", adapter, "--output", "scored")
    assert done.code == 0, done.err
    pushed = swlora("push", "--adapter", adapter, *REPO, "--dry-run", "--scores", "scored")
    assert "## Scores" in pushed.out
    assert "## Scores" not in swlora("push", "--adapter", adapter, *REPO, "--dry-run").out
    copied = tmp_path / "copied"
    adapter.rename(copied)  # it is known by its weights, wherever it lies
    again = swlora("push", "--adapter", copied, *REPO, "--dry-run", "--scores", "scored")
    assert "## Scores" in again.out


def test_scores_of_another_adapter_or_model_are_refused(small, swlora, adapter, merged, tmp_path):
    flags = (*small[2:6], "--eval-prompts", 2, "--max-new-tokens", 4)
    assert swlora("eval", *small[:2], *flags, "--output", "base").code == 0
    assert swlora("eval", "--model", merged, *flags, "--output", "of-merged").code == 0
    scored = swlora("eval", *small[:2], *flags, "--adapter", adapter, "--output", "of-adapter")
    assert scored.code == 0
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, other / "adapter_model.safetensors")
    (other / "swlora.json").unlink()
    for which, run, said in (
        (("--adapter", other), "of-adapter", f"holds scores of the adapter {adapter}, not of"),
        (("--adapter", adapter), "base", "without an adapter, not of"),
        (("--model", merged), "base", "without an adapter, not of"),
        (("--model", merged), "of-adapter", f"run swlora eval with --model {merged}"),
    ):
        assert said in swlora("push", *which, *REPO, "--dry-run", "--scores", run).mistake
    done = swlora("push", "--model", merged, *REPO, "--dry-run", "--scores", "of-merged")
    assert "## Scores" in done.out
    facts = json.loads((adapter / "swlora.json").read_text())
    noted = {"method": facts["method"], "layers": facts["layers"]}
    base = {"weights_sample_sha256": facts["base_weights_sample_sha256"]}
    report = {"adapter": noted, "base": base}
    contents = Contents("model", merged, {}, [], {}, [])
    (merged / "swlora-merge.json").write_text(json.dumps(report))
    check_scored(tmp_path / "of-adapter", contents)  # it was merged from that adapter
    report["base"] = {"weights_sample_sha256": "0" * 64}
    (merged / "swlora-merge.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="not of"):
        check_scored(tmp_path / "of-adapter", contents)


@pytest.fixture
def plain(make_model, tmp_path):
    """An adapter as PEFT alone saves it, of a model that was read from the Hub's cache."""
    model = make_model("llama")
    place = tmp_path / "hub/models--mary--tiny/snapshots/0a1b2c"
    model.save_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place)
    folder = tmp_path / "plain"
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(folder)
    assert str(place) in (folder / "README.md").read_text()
    assert str(place) in (folder / "adapter_config.json").read_text()
    return folder


def test_pefts_own_template_gives_way_to_a_card_and_no_path_goes(stand_in, swlora, plain, tmp_path):
    done = swlora("push", "--adapter", plain, *REPO, "--license", "mit")
    assert done.code == 0, done.err
    assert "README.md was a template that nobody filled in: swlora's card takes" in done.out
    assert "adapter_config.json goes with mary/tiny in place of its folder here" in done.out
    there = stand_in.repositories["mary/mine"].files("main")[1]
    assert all(str(tmp_path).encode() not in content for content in there.values())
    config = json.loads(there["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("mary/tiny", "0a1b2c")
    card = ModelCard(there["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("mary/tiny", "mit")
    assert "More Information Needed" not in card.text
    assert "adapter for mary/tiny" in card.text


def test_a_template_that_was_filled_in_is_a_persons(swlora, plain):
    text = (plain / "README.md").read_text()
    for old, new in (("[More Information Needed]", "Mine."), ("---\n", "---\nlicense: mit\n")):
        (plain / "README.md").write_text(text.replace(old, new, 1))
        done = swlora("push", "--adapter", plain, *REPO, "--dry-run")
        assert "the card README.md is yours, as it is" in done.out
        assert "README.md goes with mary/tiny in place of its folder here" in done.out
    (plain / "README.md").write_text(f"{text}\nMade in /home/mary/lora.\n")
    mistake = swlora("push", "--adapter", plain, *REPO, "--dry-run").mistake
    assert "names a folder of this machine, /home/mary/lora" in mistake


def test_an_adapter_that_names_a_folder_as_its_base_is_refused(stand_in, swlora, plain):
    config = json.loads((plain / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/data/models/tiny"
    (plain / "adapter_config.json").write_text(json.dumps(config))
    mistake = swlora("push", "--adapter", plain, *REPO).mistake
    assert "adapter_config.json names a folder of this machine" in mistake
    assert "write the base model's name on the Hub there" in mistake
    assert stand_in.requests == []


def test_a_gguf_file_that_names_a_folder_is_refused(swlora, merged):
    writer = gguf.GGUFWriter(merged / "tuned.gguf", "llama")
    writer.add_string("general.source.path", "/data/models/tiny")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    mistake = swlora("push", "--model", merged, *REPO, "--dry-run").mistake
    assert "tuned.gguf names a folder of this machine in its metadata" in mistake


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data.skip_bad_rows": True, "train.learning_rate": 3e-05, "seed": 7},
        {"identify.prompt": ["one, two", "three"], "adapter.layers": "super"},
        {"adapter.method": "pissa", "train.learning_rate": 1e-3},  # LoRA's default, not PiSSA's
        {"adapter.targets": ["q_proj", "v_proj"], "model.name": "mary/tiny", "adapter.alpha": 0.1},
    ],
)
def test_the_command_gives_the_same_settings(settings):
    spec = load_spec(None, settings)
    verb, *words = shlex.split(command_of(spec, "train"))[1:]
    parser = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    given = parser.make_context(verb, words).params
    tree = {
        name.replace("__", "."): value
        for name, value in given.items()
        if value not in (None, [], ())
    }
    known = {k: v for k, v in tree.items() if "." in k or k in RunSpec.model_fields}
    assert load_spec(None, known) == spec


def test_a_path_is_told_by_its_name_alone():
    spec = load_spec(None, {"model.name": "/home/mary/models/tiny", "data.name": "../rows.csv"})
    assert command_of(spec, "train") == "swlora train --model tiny --dataset rows.csv"


def test_a_merged_models_card_has_its_report(merged, swlora):
    base = {"name": "mary/tiny", "revision": "c" * 40, "on_hub": True, "read_from": "the Hub"}
    base |= {"flag": "mary/tiny", "weights_sample_sha256": "d" * 64}
    agreement = {"n_tokens": 512, "largest_logit_difference": 0.0123456, "kl_sum_nats": 0.5}
    agreement |= {"n_equal_top_tokens": 512, "n_continuations": 9, "n_equal_continuations": 9}
    report = {"base": base, "adapter": {"method": "lora", "layers": [2]}, "dtype": "bfloat16"}
    report |= {"agreement": agreement, "n_changed_weights": 7, "notes": ["A note."]}
    write_json(merged / "swlora-merge.json", report | {"merge_s": 1.0, "compare_s": 2.0})
    told = {"llama_cpp": "v0.4.0", "path": str(merged), "notes": [f"checked in {merged}"]}
    write_json(merged / "tuned.gguf.report.json", told)
    pushed = swlora("push", "--model", merged, *REPO, "--dry-run")
    assert pushed.code == 0, pushed.err
    assert "left out: tuned.gguf.report.json" in pushed.out  # it names a folder of this machine
    card = pushed.out[pushed.out.index("\n---\n") + 1 : pushed.out.index("nothing was sent")]
    meta = ModelCard(card).data
    assert (meta.base_model, meta.base_model_relation) == ("mary/tiny", "finetune")
    assert f"mary/tiny at {'c' * 40}" in card and "largest difference of logits 0.012" in card
    assert json.dumps(str(merged)) not in card and str(merged.parent) not in card
    (merged / "swlora-merge.json").write_text('{"base": []}')
    assert "is no merge report" in swlora("push", "--model", merged, *REPO, "--dry-run").mistake
