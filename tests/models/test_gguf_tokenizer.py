"""Tokenizers of .gguf files cut texts as the file says, which transformers' reader does not."""

from pathlib import Path

import pytest
from tests.support.gguf_models import bpe_tokenizer, tiny_model
from tests.support.llama_cpp import require_llama_cpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swlora.deploy.gguf_write import ModelParts, write_gguf
from swlora.deploy.llama_cpp import Question, ask
from swlora.models.gguf_tokenizer import read_gguf_tokenizer
from swlora.models.weight_source import open_weights
from swlora.progress import Silent

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


def write(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = tiny_model("llama")
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


@pytest.mark.parametrize(("pre", "is_whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_merges_are_passed_over_for_whole_words_of_llama_3(
    pre: str, is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    own = gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda self, _: own(self, pre))
    read = read_gguf_tokenizer(write(tmp_path, bpe_tokenizer()))
    assert read.backend_tokenizer.model.ignore_merges == is_whole
