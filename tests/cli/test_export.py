"""`swlora export`: flags that do not go together, and a model that is written."""

from pathlib import Path

import pytest
from tests.support.gguf_models import save_tiny

from swlora.cli import main


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "give either --gguf FILE"),
        (["--gguf", "a.gguf", "--gguf-lora", "b.gguf"], "give either --gguf FILE"),
        (["--gguf-lora", "a.gguf"], "--gguf-lora needs the adapter"),
        (["--gguf", "a.gguf", "--adapter", "run"], "merge the adapter into it first"),
        (["--gguf", "a.gguf", "--type", "q4_k"], "--type is f32, f16, bf16 or q8_0, not 'q4_k'"),
        (["--gguf", "a.gguf", "--base-gguf", "none.gguf"], "there is no file none.gguf"),
        (["--gguf", "a.bin", "--model", "x"], "end it with .gguf"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", *flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_a_model_is_written_and_its_check_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", tmp_path / "model")
    output = tmp_path / "x.gguf"
    main(["export", "--model", str(tmp_path / "model"), "--gguf", str(output), "--type", "f32"])
    printed = capsys.readouterr().out
    assert output.is_file() and "checked by " in printed
    assert "9 of 9 greedy continuations equal" in printed
