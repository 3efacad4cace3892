"""The card of what is published tells of the run that made it, and of no folder of this machine."""

import json
import re
import shlex

import pytest
import typer
from huggingface_hub import ModelCard

from swlora.cli.app import app
from swlora.config import RunSpec, load_spec
from swlora.deploy.run_notes import command_of
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
    assert re.search(r"^On the dev split of rows.jsonl: \d+ prompts, \d+ rows\.$", card, re.M)
    assert "examples/s in training" in card
    assert "Licence of the data: unknown: fill in" in card
    assert ModelCard(card).data.library_name == "peft"


def test_scores_may_come_from_another_run_and_are_not_those_of_best(small, swlora, adapter):
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data.skip_bad_rows": True, "train.learning_rate": 3e-05, "seed": 7},
        {"identify.prompt": ["one, two", "three"], "adapter.layers": "super"},
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
    write_json(merged / "tuned.gguf.report.json", {"llama_cpp": "v0.4.0", "path": str(merged)})
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
