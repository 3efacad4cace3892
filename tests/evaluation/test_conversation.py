"""Conversations: every answer is what plain transformers and PEFT write behind all turns so far."""

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from tests.support.adapters import move

from swlora.adapters.methods import adapt
from swlora.adapters.saved import save_adapter
from swlora.config import AdapterSpec, DecodeSpec, ModelSpec
from swlora.decoding.batch import BatchDecoder
from swlora.errors import UserError
from swlora.evaluation.conversation import Conversation
from swlora.models.load import LoadedModel, load_model

EOS, N_NEW = 257, 12
GREEDY = DecodeSpec(max_new_tokens=N_NEW)


@pytest.fixture
def loaded(model_folder) -> LoadedModel:
    return load_model(ModelSpec(name=str(model_folder("llama")), dtype="float32", device="cpu"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def talk(loaded, said):
    with closing(Conversation(loaded, GREEDY, 0, said.append)) as conversation:
        yield conversation


@pytest.fixture
def adapter(make_model, tmp_path):
    """A function (name, rank, facts) -> the folder of an adapter."""

    def save(name: str = "adapter", model_type: str = "llama", **facts: Any) -> Path:
        adapted = adapt(make_model(model_type), AdapterSpec(), [0, 2], seed=1)
        move(adapted.parameters.values(), 0.1, seed=len(name))
        save_adapter(adapted.model, tmp_path / name, facts)
        return tmp_path / name

    return save


def expected(
    make_model,
    tokenizer,
    turns: list[tuple[str, str]],
    place: Path | None = None,
    model_type: str = "llama",
) -> str:
    """What is written behind these turns."""
    ids = expected_ids(make_model, tokenizer, turns, place, model_type)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def expected_ids(
    make_model,
    tokenizer,
    turns: list[tuple[str, str]],
    place: Path | None = None,
    model_type: str = "llama",
) -> list[int]:
    model = make_model(model_type)
    if place:
        model = peft.PeftModel.from_pretrained(model, str(place))
    text = "".join(f"<s>{role}:{content};" for role, content in turns) + "<s>assistant:"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    settings = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
    out = model.generate(**ids, max_new_tokens=N_NEW, **settings)
    return list(out[0, ids.input_ids.shape[1] :].tolist())


def test_answers_know_the_turns_before_them(talk, make_model, tiny_tokenizer):
    turns: list[tuple[str, str]] = [("system", "be brief")]
    talk.system = "be brief"
    for text in ("hello", "again"):
        turns.append(("user", text))
        pieces = list(talk.answer(text))
        assert len(pieces) > 1
        assert "".join(pieces) == expected(make_model, tiny_tokenizer, turns)
        turns.append(("assistant", "".join(pieces).strip()))
        assert talk.turns == turns[1:]
    talk.reset()
    again = "".join(talk.answer("hello"))
    assert again == expected(make_model, tiny_tokenizer, turns[:2])
    talk.reset()
    talk.system = None
    assert "".join(talk.answer("hello")) == expected(make_model, tiny_tokenizer, [turns[1]])


def test_samples_depend_on_the_seed_and_differ_from_answer_to_answer(loaded, said):
    texts = []
    for seed in (1, 1, 2):
        warm = DecodeSpec(max_new_tokens=N_NEW, temperature=1.5)
        with closing(Conversation(loaded, warm, seed, said.append)) as talk:
            first = "".join(talk.answer("hello"))
            talk.reset()
            texts.append((first, "".join(talk.answer("hello"))))
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4


def test_adapters_come_and_go(talk, said, adapter, make_model, tiny_tokenizer):
    turn = [("user", "hello")]
    one, other = adapter("one", is_chat=True), adapter("other", is_chat=False)
    texts = {}
    for place in (one, None, other, one, None):
        talk.use(place)
        talk.reset()
        assert talk.adapter == place
        texts[place] = "".join(talk.answer("hello"))
        assert texts[place] == expected(make_model, tiny_tokenizer, turn, place)
    assert len(set(texts.values())) == 3
    assert said == ["the adapter was trained on prompts with completions, not on chats"]


def test_an_adapter_that_saw_other_tokens_is_told(talk, said, adapter, tiny_tokenizer):
    place = adapter(is_chat=True)
    tiny_tokenizer.save_pretrained(place)
    talk.use(place)
    assert said == []
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")
    talk.use(place)
    (line,) = said
    assert "another chat template" in line and "--tokenizer" in line


def test_the_turns_stay_when_the_adapter_changes(talk, adapter, make_model, tiny_tokenizer):
    first = "".join(talk.answer("hello")).strip()
    place = adapter()
    talk.use(place)
    turns = [("user", "hello"), ("assistant", first), ("user", "and now")]
    second = "".join(talk.answer("and now"))
    assert second == expected(make_model, tiny_tokenizer, turns, place)


def test_an_adapter_that_does_not_fit_changes_nothing(
    talk, adapter, make_model, tiny_tokenizer, tmp_path
):
    place, strange = adapter("one"), adapter("strange", "gpt2")
    for before in (None, place):
        talk.use(before)
        for wrong, reason in (
            (strange, "does not fit"),
            (tmp_path / "gone", "there is no adapter"),
        ):
            with pytest.raises(UserError, match=reason):
                talk.use(wrong)
            assert talk.adapter == before
        talk.reset()
        turn = [("user", "hello")]
        assert "".join(talk.answer("hello")) == expected(make_model, tiny_tokenizer, turn, before)


def test_another_base_is_told(talk, said, adapter):
    talk.use(adapter(base_model="x/y", base_read_from="z", base_weights_sample_sha256="0" * 64))
    (warning,) = said
    assert "was trained on x/y, read from z (sample of its weights: 000000000000)" in warning


@pytest.mark.parametrize("n_pieces", [2, 3])
def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    n_pieces, talk, make_model, tiny_tokenizer
):
    with closing(talk.answer("hello")) as pieces:
        heard = "".join(next(pieces) for _ in range(n_pieces))
    assert heard.strip()
    turns = [("user", "hello"), ("assistant", heard.strip())]
    assert talk.turns == turns
    turns.append(("user", "go on"))
    assert "".join(talk.answer("go on")) == expected(make_model, tiny_tokenizer, turns)


@pytest.mark.parametrize("n_steps", [0, 1, 4])
def test_an_interruption_at_any_moment(n_steps, talk, make_model, tiny_tokenizer, monkeypatch):
    step, steps = BatchDecoder.step, []

    def interrupted(self: BatchDecoder) -> Any:
        steps.append(self)
        if len(steps) > n_steps:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BatchDecoder, "step", interrupted)
        heard = ""
        for piece in talk.answer("hello"):
            heard += piece
    kept = [("user", "hello"), ("assistant", heard.strip())] if heard.strip() else []
    assert talk.turns == kept
    turns = [*kept, ("user", "go on")]
    assert "".join(talk.answer("go on")) == expected(make_model, tiny_tokenizer, turns)


def test_a_full_context_leaves_the_oldest_turns_out(talk, said, make_model, tiny_tokenizer):
    """The context has 256 tokens, 12 are for the answer; with its roles, a turn takes 9 more."""
    talk.turns = [("user", "a" * 80), ("assistant", "b" * 60), ("user", "c" * 20)]
    talk.turns.append(("assistant", "d" * 20))
    text = "e" * 60
    answer = "".join(talk.answer(text))
    left = [("user", "c" * 20), ("assistant", "d" * 20), ("user", text)]
    assert answer == expected(make_model, tiny_tokenizer, left)
    assert talk.turns == [*left, ("assistant", answer.strip())]
    (line,) = said
    assert "256 tokens is full: the oldest 2 turns are left out" in line


def test_a_turn_that_is_too_long_is_refused_and_the_others_stay(talk):
    before = "".join(talk.answer("hello"))
    with pytest.raises(UserError, match=r"have \d+ tokens, and the model's context of 256"):
        list(talk.answer("x" * 240))
    assert talk.turns == [("user", "hello"), ("assistant", before.strip())]


def test_a_long_answer_gets_what_room_there_is(loaded, said):
    with closing(Conversation(loaded, DecodeSpec(max_new_tokens=5000), 0, said.append)) as talk:
        list(talk.answer("x" * 150))
        assert talk.is_cut_off
    assert said == []


def test_whether_an_answer_was_cut_off(talk, loaded, said, make_model, tiny_tokenizer):
    text = "".join(talk.answer("hello"))
    assert talk.is_cut_off
    ids = expected_ids(make_model, tiny_tokenizer, [("user", "hello")])
    ends = replace(loaded, end_token_ids=(ids[5],))
    with closing(Conversation(ends, GREEDY, 0, said.append)) as other:
        short = "".join(other.answer("hello"))
        assert not other.is_cut_off
    assert short == tiny_tokenizer.decode(ids[: ids.index(ids[5])])
    assert short != text == tiny_tokenizer.decode(ids)


def test_a_family_that_is_left_to_transformers(model_folder, make_model, tiny_tokenizer, said):
    loaded = load_model(ModelSpec(name=str(model_folder("falcon")), dtype="float32", device="cpu"))
    with closing(Conversation(loaded, GREEDY, 0, said.append)) as talk:
        answer = "".join(talk.answer("hello"))
    turns = [("user", "hello")]
    assert answer == expected(make_model, tiny_tokenizer, turns, model_type="falcon")


def test_a_model_without_a_template(model_folder, tmp_path, said):
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    loaded = load_model(ModelSpec(name=str(folder), device="cpu"))
    with pytest.raises(UserError, match="no chat template: chat needs a model made for it"):
        Conversation(loaded, GREEDY, 0, said.append)
