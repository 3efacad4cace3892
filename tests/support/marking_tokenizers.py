"""Tokenizers that put the mark of a word before texts, each in another way."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

MARK = "▁"
TEXTS = ["good day bonjour bon jour au revoir", "good night a a", "day. jour.", "bon 12 3"]


def prepended() -> Tokenizer:
    """Make a BPE whose normaliser puts the mark before every text, as Llama 2's does."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def metaspace(scheme: str, model: Any) -> Tokenizer:
    """Make a tokenizer whose pre-tokeniser marks words, as Mistral's first does."""
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme=scheme, split=True)
    core.decoder = decoders.Metaspace(MARK, prepend_scheme=scheme, split=True)
    return core


def trained(core: Tokenizer) -> PreTrainedTokenizerFast:
    kind = trainers.UnigramTrainer if isinstance(core.model, models.Unigram) else None
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [*"abcdefghijklmnopqrstuvwxyz.,123 \n", MARK]
    trainer = (kind or trainers.BpeTrainer)(
        vocab_size=90,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
        **({"unk_token": "<unk>"} if kind else {}),
    )
    core.train_from_iterator(TEXTS * 9, trainer)
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


MAKERS = {
    "prepend": prepended,
    "metaspace always": lambda: metaspace("always", models.BPE(unk_token="<unk>")),
    "metaspace first": lambda: metaspace("first", models.BPE(unk_token="<unk>")),
    "unigram": lambda: metaspace("always", models.Unigram()),
    "metaspace never": lambda: metaspace("never", models.BPE(unk_token="<unk>")),
}
TOKENIZERS = {name: trained(make()) for name, make in MAKERS.items()}
