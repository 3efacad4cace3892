"""Tokenizers of .gguf files cut texts as the file says, which transformers' reader does not."""

from pathlib import Path

import pytest
from tests.conftest import N_EMBEDDINGS
from tests.deploy.test_gguf_tokenizer import sentencepiece_tokenizer
from tests.support.gguf_files import change_metadata
from tests.support.gguf_models import bpe_tokenizer, tiny_model
from tests.support.llama_cpp import require_llama_cpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swlora.deploy.gguf_write import ModelParts, write_gguf
from swlora.deploy.llama_cpp import Question, ask
from swlora.errors import UserError
from swlora.models.gguf_tokenizer import read_gguf_tokenizer
from swlora.models.weight_source import open_weights
from swlora.progress import Silent

CHAT_TOKENS = ("<|user|>", "<|end|>", "<|assistant|>")
TEXTS = ["ratio  95 %    2,100", "the 12 and  7 of 2024"]


def smollm_tokenizer() -> PreTrainedTokenizerFast:
    """Return BPE that learned to join two spaces; digits are cut off one by one before that."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXTS * 3, trainer)
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def write(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama") -> Path:
    model = tiny_model(family, vocab_size=max(N_EMBEDDINGS, len(tokenizer)))
    model.save_pretrained(folder / "model")
    parts = ModelParts(model.config, tokenizer, open_weights(folder / "model"))
    write_gguf(parts, folder / "x.gguf", "f32", "tiny", Silent())
    return folder / "x.gguf"


def test_digits_are_cut_off_one_by_one_as_in_llama_cpp(tmp_path: Path) -> None:
    tokenizer = smollm_tokenizer()
    path = write(tmp_path, tokenizer)
    expected = [tokenizer(text).input_ids for text in TEXTS]
    read = read_gguf_tokenizer(path)
    assert [read(text, add_special_tokens=False).input_ids for text in TEXTS] == expected
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert [plain(text, add_special_tokens=False).input_ids for text in TEXTS] != expected
    assert ask(require_llama_cpp(), Question(path, texts=TEXTS)).tokens == expected


MIXED = [
    "It's 2024: 12345 items, don't they'LL?\n\n  Two  spaces <=> $5 (a)/b",
    "the then there they're day  héllo  naïve \u4f60\u597d DŽ Été123abc",
    " x\t\ty \r\n z  ",
]


def wordy_tokenizer() -> PreTrainedTokenizerFast:
    """Return BPE that learned whole texts, so that any other cut of them gives other tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(MIXED * 3, trainer)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "pre",
    [
        *("llama-bpe", "falcon3", "smaug-bpe", "tekken", "gpt-4o", "qwen2", "deepseek-r1-qwen"),
        *("stablelm2", "smollm", "refact", "command-r", "gpt-2", "default", None),
    ],
)
def test_every_name_cuts_and_begins_as_llama_cpp_does(pre: str | None, tmp_path: Path) -> None:
    path = write(tmp_path, wordy_tokenizer())
    change_metadata(path, {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": None})
    read = read_gguf_tokenizer(path)
    answer = ask(require_llama_cpp(), Question(path, texts=MIXED))
    assert [read(text, add_special_tokens=False).input_ids for text in MIXED] == answer.tokens
    assert (read("x").input_ids[0] == read.bos_token_id) == answer.add_bos
    read.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in MIXED] == [read(text).input_ids for text in MIXED]


def test_an_unknown_cut_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, bpe_tokenizer())
    change_metadata(path, {"tokenizer.ggml.pre": "deepseek-coder"})
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre: deepseek-coder"):
        read_gguf_tokenizer(path)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_comes_before_a_text_where_the_file_says_so(prefix: bool, tmp_path: Path) -> None:
    own = sentencepiece_tokenizer(prefix)
    path = write(tmp_path, own)
    read = read_gguf_tokenizer(path)
    expected = [own(text).input_ids for text in TEXTS]
    assert [read(text).input_ids for text in TEXTS] == expected
    assert [read.decode(tokens) for tokens in expected] == TEXTS
    assert ask(require_llama_cpp(), Question(path, texts=TEXTS)).tokens == expected


BEHIND_SPECIAL_TOKENS = [
    "<s><|user|>\nthe 12<|end|>\n<|assistant|>\n",
    "<s> the </s>\n the<unk> 7",
    " the  and",
]


@pytest.mark.parametrize("name", ["tiny", "Tiny-PHI3"])
@pytest.mark.parametrize(("prefix", "family"), [(True, "llama"), (False, "llama"), (True, "phi3")])
def test_texts_behind_special_tokens_are_cut_as_in_llama_cpp(
    prefix: bool, family: str, name: str, tmp_path: Path
) -> None:
    own = sentencepiece_tokenizer(prefix)
    own.add_special_tokens({"additional_special_tokens": [*CHAT_TOKENS, "<|endoftext|>"]})
    path = write(tmp_path, own, family)
    change_metadata(path, {"general.name": name})
    read = read_gguf_tokenizer(path)
    found = [read(text, add_special_tokens=False).input_ids for text in BEHIND_SPECIAL_TOKENS]
    expected = ask(require_llama_cpp(), Question(path, texts=BEHIND_SPECIAL_TOKENS)).tokens
    assert found == expected
    line_breaks = [ids.count(read.convert_tokens_to_ids("<0x0A>")) for ids in expected]
    assert line_breaks == ([0, 0, 0] if name != "tiny" else [3, 1, 0])
    read.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert found == [
        again(text, add_special_tokens=False).input_ids for text in BEHIND_SPECIAL_TOKENS
    ]


@pytest.mark.parametrize(("pre", "is_whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_merges_are_passed_over_for_whole_words_of_llama_3(
    pre: str, is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    own = gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda self, _: own(self, pre))
    read = read_gguf_tokenizer(write(tmp_path, bpe_tokenizer()))
    assert read.backend_tokenizer.model.ignore_merges == is_whole
