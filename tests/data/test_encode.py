"""Encoding: against a byte-level tokenizer whose ids are known by hand, and GPT-2's own."""

import csv
from pathlib import Path

import pytest
from tests.support.chat_templates import chat
from tests.support.encoding import encode_example
from tests.support.tokenizers import BOS, EOS, byte_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from swlora.data import encode
from swlora.data.encode import encode_examples, encode_prompts
from swlora.data.examples import Example
from swlora.errors import DataError, UserError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and loop.index0 %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<s>{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CHAT = (("system", "Be brief."), ("user", "é?"))


def encode_split(*arguments, **limits):
    """Return the sequences, and how many of them were cut."""
    encoded = encode_examples(*arguments, **limits)
    assert encoded.example_ids.tolist() == list(range(len(encoded.sequences)))
    assert encoded.bad == {}
    return encoded.sequences, encoded.n_cut


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("template", "front"),
    [("$A", []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", []), ("</s> $A", [EOS])],
)
def test_the_prompt_keeps_the_special_tokens_in_front_and_no_others(template, front):
    tokenizer = byte_tokenizer(template, bos_token="<s>")
    example = Example("name[é], food[Thai]", " It has\n£5 dishes. ")
    prompt, completion = encode_example(example, "\n", tokenizer)
    assert prompt == front + as_bytes("name[é], food[Thai]\n")
    assert completion == [*as_bytes(" It has\n£5 dishes. "), EOS]


def test_an_eos_written_in_the_prompt_itself_stays():
    for template in ("$A", "$A </s>"):
        prompt, _ = encode_example(Example("a</s>", "b"), "", byte_tokenizer(template))
        assert prompt == [ord("a"), EOS]


def test_an_end_that_is_the_padding_too_is_trained():
    tokenizer = byte_tokenizer(pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    pairs = [Example("a", "b"), Example("a", "longer")]
    sequences, _ = encode_split(pairs, "", tokenizer, context_tokens=9, truncate=False)
    assert sequences.tokens.tolist() == [*as_bytes("ab"), EOS, *as_bytes("alonger"), EOS]
    assert sequences.weights.tolist() == [False, True, True, False, *[True] * 7]


def test_a_tokenizer_without_an_end_is_refused_with_what_to_do():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-sequence token.*: name one as eos_token in"):
        encode_split([Example("a", "b")], "", tokenizer, context_tokens=9, truncate=False)


def test_an_empty_prompt_becomes_one_start_token():
    assert encode_prompts([Example("", "x")], "", byte_tokenizer("$A </s>")) == [[EOS]]
    assert encode_prompts([Example("", "x")], "", byte_tokenizer(bos_token="<s>")) == [[BOS]]
    with_bos = byte_tokenizer("<s> $A", bos_token="<s>")
    assert encode_prompts([Example("", "x")], "", with_bos) == [[BOS]]


def test_a_chat_is_written_by_the_template_without_a_second_bos():
    tokenizer = byte_tokenizer("<s> $A </s>", bos_token="<s>", chat_template=TEMPLATE)
    prompt, completion = encode_example(chat(CHAT, "Ja"), "never used", tokenizer)
    parts = ("system:Be brief.;", "user:é?;", "assistant:")
    assert prompt == [token for part in parts for token in [BOS, *as_bytes(part)]]
    assert completion == as_bytes("Ja;")  # as the template ends it, and nothing else


def test_chats_that_cannot_be_written_are_refused():
    with pytest.raises(UserError, match="no chat template"):
        encode_prompts([chat(CHAT, "x")], "", byte_tokenizer())
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    with pytest.raises(UserError, match=r"user, system: system must come first"):
        encode_prompts([chat(CHAT[::-1], "x")], "", tokenizer)


def test_a_split_equals_its_examples_encoded_one_by_one():
    tokenizer = byte_tokenizer("<s> $A </s>", bos_token="<s>", chat_template=TEMPLATE)
    examples = [
        Example("one", "a"),
        Example("", "from nothing"),
        chat(CHAT, "b"),
        Example("three", "longer than the others"),
        Example("one", "cc"),
        chat(CHAT[1:], "d"),
        chat(CHAT, "e"),
    ]
    sequences, n_cut = encode_split(examples, ": ", tokenizer, context_tokens=200, truncate=False)
    assert (len(sequences), n_cut) == (7, 0)
    expected = [encode_example(example, ": ", tokenizer) for example in examples]
    for i, (prompt, completion) in enumerate(expected):
        start, end = sequences.offsets[i], sequences.offsets[i + 1]
        assert sequences.tokens[start:end].tolist() == prompt + completion
        assert sequences.weights[start:end].tolist() == [0] * len(prompt) + [1] * len(completion)
    assert encode_prompts(examples, ": ", tokenizer) == [prompt for prompt, _ in expected]


def test_each_distinct_prompt_is_tokenised_once():
    tokenizer = byte_tokenizer()
    seen: list[str] = []

    class Counting:
        eos_token_id, bos_token_id, name_or_path = EOS, None, "counting"

        def __call__(self, texts: list[str], **options: object) -> object:
            seen.extend(texts)
            return tokenizer(texts, **options)

    examples = [Example(f"prompt {i % 3}", f"completion {i}") for i in range(11)]
    encode_examples(examples, "\n", Counting(), context_tokens=99, truncate=False)  # type: ignore[arg-type]
    assert [text for text in seen if text.startswith("prompt")] == [f"prompt {i}\n" for i in "012"]


def test_a_length_limit_stored_with_the_tokenizer_cuts_nothing():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    prompt, completion = encode_example(Example("a long prompt", "a long answer"), "", tokenizer)
    assert (len(prompt), len(completion)) == (13, 14)


def test_rows_longer_than_the_context_are_refused_by_number():
    examples = [Example("12345", "1234"), Example("123", "1234567"), Example("123456", "12345678")]
    sequences, _ = encode_split(
        examples[:2], "", byte_tokenizer(), context_tokens=11, truncate=False
    )
    assert sequences.lengths.tolist() == [10, 11]  # exactly full is fine
    with pytest.raises(DataError, match=r"row 3 has 15 tokens, 6 of prompt and 9 of completion"):
        encode_examples(examples, "", byte_tokenizer(), context_tokens=11, truncate=False)
    with pytest.raises(DataError, match=r"row 2 .* is 10 \(and 1 more such rows\); --truncate"):
        encode_examples(examples, "", byte_tokenizer(), context_tokens=10, truncate=False)


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(UserError, match="no rows"):
        encode_examples([], "", byte_tokenizer(), context_tokens=9, truncate=True)
    with pytest.raises(UserError, match="no rows"):
        encode_prompts([], "", byte_tokenizer())
    with pytest.raises(UserError, match="end-of-sequence"):
        encode_example(Example("a", "b"), "", byte_tokenizer(eos_token=None))
    with pytest.raises(UserError, match="context of 1 token"):
        encode_examples([Example("a", "b")], "", byte_tokenizer(), context_tokens=1, truncate=True)


def gpt2(shared_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(shared_dir / "gpt2-tokenizer" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )


def e2e_rows(shared_dir: Path, name: str) -> list[Example]:
    with (shared_dir / "e2e-dataset" / name).open(encoding="utf-8", newline="") as file:
        return [Example(row["mr"], row["ref"]) for row in csv.DictReader(file)]


def test_gpt2_ids_are_those_of_its_own_tokenizer(shared_dir: Path):
    plain = Tokenizer.from_file(str(shared_dir / "gpt2-tokenizer" / "tokenizer.json"))
    tokenizer = gpt2(shared_dir)
    for example in e2e_rows(shared_dir, "devset.csv")[::173]:
        prompt, completion = encode_example(example, "\n", tokenizer)
        assert prompt == plain.encode(example.prompt + "\n").ids
        assert completion == [*plain.encode(example.completion).ids, 50256]
    assert encode_prompts([Example("", "x")], "", tokenizer) == [[50256]]


@pytest.mark.slow
def test_all_of_e2e_reads_back_as_it_was_written(shared_dir: Path):
    tokenizer = gpt2(shared_dir)
    examples = e2e_rows(shared_dir, "trainset.csv")
    sequences, n_cut = encode_split(examples, "\n", tokenizer, context_tokens=1024, truncate=False)
    assert (len(sequences), n_cut) == (42061, 0)
    for i, example in enumerate(examples):
        ids = sequences.tokens[sequences.offsets[i] : sequences.offsets[i + 1]].tolist()
        n_prompt = sequences.prompt_lengths[i]
        if i % 20 == 0:
            assert tokenizer.decode(ids[:n_prompt]) == example.prompt + "\n"
            assert tokenizer.decode(ids[n_prompt:-1]) == example.completion
        assert ids[-1] == 50256


@pytest.mark.parametrize("chunk_rows", [1, 2, 5])
def test_chunks_change_nothing(chunk_rows, monkeypatch):
    """Rows are encoded some at a time; numbers of rows are those of the whole data."""
    examples = [Example(f"prompt {i % 3}", "word " * i) for i in range(7)]
    tokenizer = byte_tokenizer("<s> $A")

    def encoded(context_tokens):
        return encode_split(examples, ":", tokenizer, context_tokens=context_tokens, truncate=True)

    (whole, n_cut), (long, n_long) = encoded(30), encoded(99)
    monkeypatch.setattr(encode, "CHUNK_EXAMPLES", chunk_rows)
    monkeypatch.setattr(encode, "CHUNK_BYTES", 1 if chunk_rows == 1 else 1 << 20)
    for context_tokens, expected, n in ((30, whole, n_cut), (99, long, n_long)):
        found, n_found = encoded(context_tokens)
        assert n_found == n
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.offsets.tolist() == expected.offsets.tolist()
        assert found.weights.tolist() == expected.weights.tolist()
        assert found.tokens.dtype == expected.tokens.dtype
    assert (n_cut, n_long) == (3, 0)
    with pytest.raises(DataError, match=r"row 5 has 31 tokens.* \(and 2 more such rows\)"):
        encode_examples(examples, ":", tokenizer, context_tokens=30, truncate=False)
