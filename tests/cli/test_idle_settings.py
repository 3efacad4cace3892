"""A flag that would do nothing is refused in one line, and taken where it does something."""

from pathlib import Path

import pytest

from swlora import idle_settings
from swlora.config import load_spec
from swlora.errors import UserError
from swlora.idle_settings import check_effects

NO_SEARCH = "looks for no super weight (super and super+removal do); leave out"
FIRST = "adapts the first layer, below which there are no states; leave out --cache-gb"
PLAIN = "--engine plain"
GREEDY = "nothing is drawn at random with --temperature 0; leave out --top-p"
GB = ["--memory-gb", 1]
AS_IT_LIES = "a.gguf stays as it lies in its file, without copies of weights"
HELD_OUT = "train uses no held-out row with --eval-every-steps 0"


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        (["--windows", 2], f"--layers all {NO_SEARCH} --windows"),
        (["--layers", "last:2", "--controls", 5], f"--layers last:2 {NO_SEARCH} --controls"),
        (
            ["--layers", "auto:0.5", "--prompt", "a", "--text", "t.txt", "--window-tokens", 32],
            f"--layers auto:0.5 {NO_SEARCH} --prompt, --text, --window-tokens",
        ),
        (["--layers", "2", "--max-candidates", 8], f"--layers 2 {NO_SEARCH} --max-candidates"),
        (["--cache-gb", 1], f"--layers all {FIRST}"),
        (["--layers", "first:2", "--cache-gb", 2], f"--layers first:2 {FIRST}"),
        (["--layers", "2,0", "--cache-gb", 1], f"--layers 2,0 {FIRST}"),
        (
            ["--layers", 2, "--engine", "plain", "--cache-gb", 1],
            f"{PLAIN} keeps no states; leave out --cache-gb",
        ),
        (
            ["--engine", "plain", "--row-tokens", 64],
            f"{PLAIN} runs a step as one batch; leave out --row-tokens",
        ),
        (
            ["--method", "full", "--rank", 4],
            "--method full has no such setting; leave out --rank",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["train", "train-eval"])
def test_training(verb, arguments, mistake, swlora):
    assert swlora(verb, *arguments).mistake == mistake
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        (
            ["identify", "--dtype", "bfloat16"],
            "identify measures weights in float32; leave out --dtype",
        ),
        (
            ["train", "--eval-every-steps", 0, "--split", "test", "--eval-prompts", 2],
            f"{HELD_OUT}; leave out --split, --eval-prompts",
        ),
        (
            ["train", "--engine", "plain", "--row-tokens", 64, "--windows", 1],
            f"{PLAIN} runs a step as one batch; leave out --row-tokens; "
            f"--layers all {NO_SEARCH} --windows",
        ),
        *(
            ([*verb, "--top-p", 0.5], GREEDY)
            for verb in (["eval"], ["train-eval"], ["generate", "--prompt", "x"])
        ),
        (["chat", "--temperature", 0, "--top-p", 0.5], GREEDY),
        (
            ["identify", "--memory-gb", 1],
            "identify makes no copies of weights; leave out --memory-gb",
        ),
        (
            [*("generate", "--prompt", "x"), *("--model", "a.gguf", "--frozen", "gguf"), *GB],
            f"{AS_IT_LIES}; leave out --memory-gb",
        ),
        (
            ["train", "--engine", "plain", "--model", "a.gguf", "--frozen", "gguf", *GB],
            f"{AS_IT_LIES}, and {PLAIN} runs a step as one batch; leave out --memory-gb",
        ),
        (
            ["eval", "--device", "cuda", "--memory-gb", 1],
            "--device cuda makes no copies of weights; leave out --memory-gb",
        ),
        (["generate", "--prompt", "x", "--eval-batch-size", 2], None),
    ],
)
def test_other_verbs(arguments, mistake, swlora):
    said = swlora(*arguments).mistake
    assert said == mistake or (mistake is None and "No such option: --eval-batch-size" in said)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", {"adapter.layers": "super", "identify.windows": 1, "train.cache_gb": 1}),
        ("train-eval", {"adapter.layers": "super+removal", "identify.controls": 3}),
        ("train", {"adapter.layers": "last:2", "train.cache_gb": 1, "train.row_tokens": 64}),
        ("train", {"train.eval_rows": 4, "data.eval_split": "test", "data.eval_prompts": 2}),
        ("train", {"adapter.method": "full", "train.row_tokens": 64}),
        ("train", {"adapter.method": "dora", "adapter.rank": 4}),
        ("train-eval", {"train.eval_every_steps": 0, "data.eval_split": "test"}),
        ("identify", {"identify.windows": 1, "model.dtype": "float32"}),
        ("generate", {"decode.temperature": 0.5, "decode.top_p": 0.5}),
        ("chat", {"decode.top_p": 0.5}),
        ("generate", {"model.memory_gb": 0, "model.name": "a.gguf", "model.frozen": "gguf"}),
        ("train", {"model.memory_gb": 1, "model.name": "a.gguf", "model.frozen": "dequantised"}),
        ("train", {"model.memory_gb": 1, "model.name": "a.gguf", "model.frozen": "gguf"}),
        ("train-eval", {"model.memory_gb": 1, "model.name": "a.gguf", "model.frozen": "gguf"}),
        ("train", {"model.memory_gb": 1}),
        ("train", {"adapter.layers": "all", "train.cache_gb": 0}),
        ("train", {"adapter.layers": "first:2", "train.cache_gb": 0}),
        ("train", {"adapter.layers": "2", "train.engine": "plain", "train.cache_gb": 0}),
        ("generate", {"decode.temperature": 0, "decode.top_p": 1}),
        ("chat", {"decode.temperature": 0, "decode.top_p": 1}),
        ("train", {"adapter.method": "full", "adapter.dropout": 0}),
        ("train", {"adapter.method": "supertuning", "adapter.dropout": 0}),
        ("train", {"adapter.layers": "auto:0.5", "train.engine": "plain", "train.row_tokens": 64}),
    ],
)
def test_flags_that_do_something_are_taken(command, flags):
    check_effects(command, load_spec(None, flags), flags)


def test_a_file_may_hold_what_a_command_leaves_alone(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("identify: {windows: 1}\ndecode: {top_p: 0.5}\ntrain: {cache_gb: 1}\n")
    check_effects("train", load_spec(path, {"seed": 1}), ["seed"])
    with_flag = load_spec(path, {"adapter.layers": "last:1"})
    check_effects("train", with_flag, ["adapter.layers"])


def test_a_large_gguf_file_leaves_only_steps_to_limit(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(100))
    given = {"model.name": str(path), "model.memory_gb": 1}
    check_effects("generate", load_spec(None, given), given)
    monkeypatch.setattr(idle_settings, "KEPT_ABOVE_BYTES", 99)
    with pytest.raises(UserError, match=r"stays as it lies in its file.* leave out --memory-gb"):
        check_effects("generate", load_spec(None, given), given)
    check_effects("train", load_spec(None, given), given)
    given |= {"train.engine": "plain"}
    with pytest.raises(UserError, match="stays as it lies in its file"):
        check_effects("train", load_spec(None, given), given)
    searched = load_spec(None, given | {"adapter.layers": "super"})  # in weights that are copied
    check_effects("train", searched, given)
