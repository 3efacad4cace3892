"""A command that is given an adapter and no model takes the model that it was trained on."""

import io
import shutil
import sys

OTHER_COMMANDS = (
    ("eval", "--dataset", "rows.jsonl", "--max-new-tokens", 2),
    ("generate", "--prompt", "p0", "--max-new-tokens", 2),
    ("identify", "--windows", 1, "--window-tokens", 16, "--controls", 1, "--prompt", "Hello"),
    ("chat", "--max-new-tokens", 2),
)


def test_without_a_model_the_base_is_that_of_the_adapter(swlora, small, model_folder, monkeypatch):
    assert swlora("train", *small, "--output", "run").code == 0
    source = f"model: the folder {model_folder('llama')}"
    for command in OTHER_COMMANDS:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        done = swlora(*command, "--adapter", "run")
        assert done.code == 0, done
        assert source in done.err.splitlines()

    other = model_folder("qwen2")  # of the same shapes
    done = swlora(*OTHER_COMMANDS[1], "--adapter", "run", "--model", other)
    assert f"model: the folder {other}" in done.err and "was trained on" in done.err

    shutil.copytree("run/adapter", "moved")  # away from the run that knows the folder
    for command in OTHER_COMMANDS:
        mistake = swlora(*command, "--adapter", "moved").mistake
        assert mistake.startswith("moved was trained on ") and "with --model" in mistake
