"""`swlora merge` as a user meets it: its lines, its files, its exit codes."""

import json

import pytest
from tests.deploy.test_merge import adapter_of

from swlora.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["merge", *arguments])
        raise SystemExit(0)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_a_user_merges_an_adapter(model_folder, tmp_path, capsys):
    base, adapter = model_folder("llama"), adapter_of(model_folder("llama"), tmp_path / "a")
    where = ["--adapter", str(adapter), "--output", str(tmp_path / "m")]
    code, out, _ = run(
        capsys, *where, "--model", str(base), "--dtype", "float32", "--json", str(tmp_path / "r")
    )
    assert code == 0
    assert "equal greedy continuations: 9 of 9" in out
    assert f"merged model: {tmp_path / 'm'}" in out
    result = json.loads((tmp_path / "r").read_text())
    assert result["agreement"]["n_continuations"] == 9
    code, _, err = run(capsys, *where, "--model", str(base))
    assert code == 2 and "is in use" in err and len(err.splitlines()) == 1
    code, out, err = run(capsys, "--adapter", str(adapter), "--output", str(tmp_path / "n"))
    assert code == 2 and "--model" in err and not (tmp_path / "n").exists()


def test_a_merged_model_is_a_model_of_the_other_commands(model_folder, tmp_path, capsys):
    adapter = adapter_of(model_folder("llama"), tmp_path / "a")
    merged = str(tmp_path / "m")
    code, *_ = run(
        capsys, "--adapter", str(adapter), "--output", merged, "--model", str(model_folder("llama"))
    )
    assert code == 0
    texts = []
    common = ["--prompt", "good day", "--max-new-tokens", "8", "--temperature", "0"]
    dtype = ["--dtype", "float32", "--device", "cpu"]
    base = ["--model", str(model_folder("llama")), "--adapter", str(adapter)]
    for which in (base, ["--model", merged]):
        main(["generate", *which, *common, *dtype])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()


def test_values_that_mean_nothing_are_refused(capsys):
    for flags in (["--shard-gb", "0"], ["--dtype", "int8"]):
        code, _, err = run(capsys, "--adapter", "a", "--output", "m", *flags)
        assert code == 2 and len(err.splitlines()) == 1
    code, _, err = run(capsys, "--adapter", "a", "--output", "m", "--shard-gb", "inf")
    assert code == 2 and err == "swlora: shard_gb must be at least 0.001 and finite, not inf\n"
