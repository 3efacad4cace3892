"""A byte-level tokenizer without merges: the id of a token is the value of its byte."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 256, 257


def byte_level_core() -> Tokenizer:
    """Return the bare tokenizer of 256 tokens, without special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    vocab = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core


def byte_tokenizer(template: str = "$A", **tokens: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with id = byte value, <s> = 256, </s> = 257."""
    core = byte_level_core()
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **({"eos_token": "</s>"} | tokens))
