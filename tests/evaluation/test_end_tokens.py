"""A model may name several end tokens: texts end where plain transformers ends them."""

import json
import re
import shutil
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from swlora.config import DecodeSpec, ModelSpec, RunSpec
from swlora.evaluation.decode import generate
from swlora.evaluation.prompting import Prompt, generate_text
from swlora.models.load import LoadedModel, load_model
from swlora.progress import Silent

PROMPTS = [list(b"name[A], food[x]"), list(b"z"), list(b"Some longer prompt here: "), list(b"ab")]
EOS, N_NEW = 257, 24


def plain(folder: Path, prompt: list[int], **settings) -> list[int]:
    """The new tokens that transformers writes, with the folder's own generation_config.json."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=N_NEW,
        **settings,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def folder_with(model_folder, tmp_path):
    """A function (model_type, **decode) -> (a folder whose model also ends at X, X).

    X is an ordinary token that it would write in the middle of the first prompt's text.
    """

    def made(model_type: str, **decode) -> tuple[Path, int]:
        folder = Path(shutil.copytree(model_folder(model_type), tmp_path / "several"))
        token_id = plain(folder, PROMPTS[0], **decode)[7]
        settings = {"eos_token_id": [EOS, token_id], "pad_token_id": EOS}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        return folder, token_id

    return made


def load(folder: Path) -> LoadedModel:
    return load_model(ModelSpec(name=str(folder), dtype="float32", device="cpu"))


def texts_of(loaded: LoadedModel, ends: tuple[int, ...], prompts=PROMPTS, **decode) -> list[str]:
    spec = DecodeSpec(max_new_tokens=N_NEW, batch_size=3, **decode)
    return generate(
        loaded.model, loaded.tokenizer, prompts, spec, Silent(), end_token_ids=ends, seed=3
    )


# By rows, by beams, and by `generate` of transformers (Falcon)
@pytest.mark.parametrize(
    ("model_type", "decode"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("llama", {"num_beams": 3}),
        ("gpt2", {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 2}),
        ("falcon", {}),
        ("falcon", {"num_beams": 3}),
    ],
)
def test_greedy_text_and_beams_end_as_in_transformers(model_type, decode, folder_with):
    folder, token_id = folder_with(model_type, **decode)
    loaded = load(folder)
    assert loaded.end_token_ids == tuple(sorted((EOS, token_id)))
    expected = [plain(folder, prompt, **decode) for prompt in PROMPTS]
    assert any(token_id in ids for ids in expected)  # X ends one of them
    kept = [[i for i in ids if i not in loaded.end_token_ids] for ids in expected]
    decoded = loaded.tokenizer.batch_decode(kept, skip_special_tokens=True)
    assert texts_of(loaded, loaded.end_token_ids, **decode) == decoded


@pytest.mark.parametrize("decode", [{}, {"no_repeat_ngram_size": 3}])
def test_sampled_text_ends_there_too(decode, folder_with):
    """The same draws, as far as the first end token: one prompt at a time, since transformers
    (which samples where n-grams are blocked) draws for a batch.
    """
    loaded = load(folder_with("llama")[0])
    letters = tuple(string.ascii_letters.encode())
    free, held = (
        [texts_of(loaded, ends, [p], temperature=1.0, **decode)[0] for p in PROMPTS]
        for ends in ((EOS,), (EOS, *letters))
    )
    assert held == [re.split("[A-Za-z]", text)[0] for text in free]
    assert held != free


def test_generate_reads_them_from_the_folder(folder_with):
    folder, token_id = folder_with("llama")
    prompt = PROMPTS[0]
    spec = RunSpec(
        model=ModelSpec(name=str(folder), dtype="float32"), decode=DecodeSpec(max_new_tokens=N_NEW)
    )
    text = generate_text(spec, Prompt(bytes(prompt).decode()), None, Silent()).text
    expected = plain(folder, prompt)
    assert expected[-1] == token_id
    assert text == load(folder).tokenizer.decode(expected[:-1])
