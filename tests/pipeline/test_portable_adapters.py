"""What a training leaves means the same on another machine: names, tokenizer, model card."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from tests.support.data_files import write_rows
from tests.support.small_runs import Heard
from transformers import AutoModelForCausalLM, AutoTokenizer

from swlora import pipeline
from swlora.adapters.saved import read_facts
from swlora.config import load_spec
from swlora.job import Job
from swlora.progress import Silent
from swlora.runs import Run

ROWS = [{"prompt": f"say {n}\n", "completion": f"{n} and {n}."} for n in ("one", "two", "three")]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": n}]}
    for n in ("one", "two", "three")
]


pytestmark = pytest.mark.usefixtures("no_drawings")


def trained(folder: Path, model: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Train for six steps; return the adapter's folder."""
    data = write_rows(folder.with_suffix(".jsonl"), rows)
    settings = {
        "model.name": str(model),
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.name": str(data),
        "data.eval_file": str(data),
        "train.learning_rate": 0.02,
        "train.batch_size": 1,
        "train.epochs": 2,
    }
    spec = load_spec(None, settings | {k.replace("__", "."): v for k, v in changes.items()})
    with Run.create(folder, spec, "train") as run:
        pipeline.train(Job(spec, run, Silent()))
    return folder / "adapter"


def front_matter(folder: Path) -> dict[str, Any]:
    _, meta, _ = (folder / "README.md").read_text().split("---\n", 2)
    return dict(yaml.safe_load(meta))


@pytest.mark.parametrize("method", ["lora", "pissa", "full", "dora", "adalora"])
def test_an_adapter_names_no_place_of_this_machine(method, model_folder, tmp_path):
    source = model_folder("llama")
    folder = trained(tmp_path / "run", source, ROWS, adapter__method=method)
    for path in folder.iterdir():
        for place in (tmp_path, source):
            assert str(place).encode() not in path.read_bytes(), path.name
    for config in (json.loads((folder / "adapter_config.json").read_text()), read_facts(folder)):
        assert source.name in (config.get("base_model_name_or_path"), config.get("base_model"))
    local = json.loads((folder / "tokenizer_config.json").read_text()).keys()
    assert not local & {"is_local", "local_files_only", "name_or_path"}


def test_the_tokenizer_comes_with_it(model_folder, tmp_path):
    source = model_folder("llama")
    folder = trained(tmp_path / "run", source, ROWS)
    ours, base = (AutoTokenizer.from_pretrained(place) for place in (folder, source))
    assert ours("<s>name[é]\n 𝔘</s>").input_ids == base("<s>name[é]\n 𝔘</s>").input_ids
    assert ours.special_tokens_map == base.special_tokens_map
    assert ours.chat_template == base.chat_template is not None
    assert ours.get_vocab() == base.get_vocab()


def test_a_model_of_the_hub_is_named_with_its_commit(make_model, tiny_tokenizer, tmp_path):
    source = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    make_model("llama").save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    folder = trained(tmp_path / "run", source, ROWS)
    config = PeftConfig.from_pretrained(folder)
    assert (config.base_model_name_or_path, config.revision) == ("owner/name", "0123abc")
    meta = front_matter(folder)
    assert (meta["base_model"], meta["library_name"]) == ("owner/name", "peft")
    assert "base_model:adapter:owner/name" in meta["tags"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder)


def test_a_model_that_is_not_on_the_hub_is_not_linked_there(model_folder, tmp_path):
    folder = trained(tmp_path / "run", model_folder("llama"), ROWS)
    assert "base_model" not in front_matter(folder)
    assert model_folder("llama").name in (folder / "README.md").read_text()


@pytest.mark.parametrize(("rows", "is_chat"), [(ROWS, False), (CHATS, True)])
def test_the_cards_own_commands_give_the_models_text(rows, is_chat, model_folder, tmp_path):
    """The Python in README.md, with a path in place of the names, against our own decoding."""
    source = model_folder("llama")
    folder = trained(tmp_path / "run", source, rows, adapter__rank=2)
    assert read_facts(folder)["is_chat"] is is_chat
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    asked = {"YOUR PROMPT": "say two\n", "YOUR MESSAGE": "say two"}
    for name, value in {**asked, "THIS-FOLDER": str(folder)}.items():
        code = code.replace(f'"{name}"', repr(value))
    code = code.replace(repr(source.name), repr(str(source)))
    printed = io.StringIO()
    with torch.no_grad(), redirect_stdout(printed):
        exec(code, {})
    verb = "chat" if is_chat else "generate"
    assert f"swlora {verb} --model {source.name} --adapter THIS-FOLDER" in card
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder)
    prompt = "<s>user:say two;<s>assistant:" if is_chat else "say two\n"
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=96, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert printed.getvalue() == tokenizer.decode(out, skip_special_tokens=True) + "\n"


def test_the_card_says_what_was_done(model_folder, tmp_path):
    changes = {"adapter__method": "pissa", "adapter__rank": 3, "adapter__layers": "last:2"}
    folder = trained(tmp_path / "run", model_folder("llama"), ROWS, **changes)
    card, facts = (folder / "README.md").read_text(), read_facts(folder)
    for said in (
        "# PiSSA adapter for llama",
        "rank 3, alpha 32, dropout 0 (saved as LoRA of rank 6)",
        "Layers: 1, 2 (`--layers last:2`: asked for as the last ones)",
        "run.jsonl, 3 rows (prompts with completions)",
        facts["base_weights_sample_sha256"],
        facts["data"]["sha256"],
        f"{facts['losses_nats_per_token']['training, last step']:.4f} nats",
        f"peft {facts['packages']['peft']}",
    ):
        assert said in card
    assert "license" not in front_matter(folder)


def evaluated(model: Path, adapter: Path, folder: Path) -> list[str]:
    data, heard = write_rows(folder.with_suffix(".jsonl"), ROWS), Heard()
    settings = {"model.name": str(model), "data.name": str(data), "data.eval_file": str(data)}
    spec = load_spec(None, settings | {"decode.max_new_tokens": 2, "model.dtype": "bfloat16"})
    with Run.create(folder, spec, "eval") as run:
        pipeline.evaluate_adapter(Job(spec, run, heard), adapter)
    return [line for line in heard.lines if "warning" in line]


def test_another_base_of_the_same_shape_is_told(model_folder, make_model, tiny_tokenizer, tmp_path):
    adapter = trained(tmp_path / "run", model_folder("llama"), ROWS)  # in float32
    assert evaluated(model_folder("llama"), adapter, tmp_path / "same") == []
    other = tmp_path / "other"
    make_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    (warning,) = evaluated(other, adapter, tmp_path / "changed")
    assert f"trained on {model_folder('llama').name}" in warning
    assert f"this is the folder {other}" in warning
    assert len(warning.splitlines()) == 1
    old = {"separator": "", "base_model": str(tmp_path), "layers": [0, 1, 2], "method": "lora"}
    (adapter / "swlora.json").write_text(json.dumps(old))
    assert evaluated(other, adapter, tmp_path / "unknown") == []
