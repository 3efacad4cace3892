"""A byte-level tokenizer without merges: the id of a token is the value of its byte."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_level_core() -> Tokenizer:
    """Return the bare tokenizer of 256 tokens, without special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    vocab = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core
