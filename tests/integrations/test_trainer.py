"""Trainers with the mixin and without: the same losses, step by step, and the same evaluation."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.adapters import attach
from tests.support.collated import IGNORED, labelled, padded
from tests.support.models import MakeModel
from tests.support.sequences import branching
from transformers import Trainer, TrainingArguments

from swlora import PrefixSampler, TreeTrainerMixin
from swlora.config import AdapterSpec
from swlora.errors import UserError
from swlora.integrations import trainer as module
from swlora.integrations.tree_loss import _ATTRIBUTE

ROWS = [{"input_ids": ids, "labels": labels} for ids, labels in labelled(branching())]
HELD_OUT = ROWS[3:16:2]


class TreeTrainer(TreeTrainerMixin, Trainer):
    """transformers' Trainer over prefix trees."""


class GroupedTrainer(TreeTrainer):
    """The same, with what shares a prompt in a batch."""

    prefix_order = "prompts"


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return padded([(row["input_ids"], row["labels"]) for row in rows], "right")


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | more


@pytest.fixture
def new_model(make_model: MakeModel) -> Any:
    def make(model_type: str = "llama", dropout: float = 0.0) -> Any:
        model = make_model(model_type, initializer_range=0.05)
        return attach(model, AdapterSpec(rank=3, alpha=7, dropout=dropout), [0, 1, 2], seed=1)

    return make


def curve(trainer: Any) -> list[dict[str, float]]:
    """Train; return what was logged of losses and gradients."""
    trainer.train()
    wanted = ("loss", "grad_norm", "eval_loss")
    return [{k: v for k, v in line.items() if k in wanted} for line in trainer.state.log_history]


def assert_same_curves(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) and sum("eval_loss" in line for line in expected) > 1
    losses = [line["loss"] for line in expected if "loss" in line]
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_trainer_of_transformers(new_model: Any, tmp_path: Path, accumulated: int) -> None:
    curves = []
    for kind in (Trainer, TreeTrainer):
        args = arguments(tmp_path, gradient_accumulation_steps=accumulated)
        trainer: Any = kind(
            new_model(), TrainingArguments(**args), collate, ROWS, eval_dataset=HELD_OUT
        )
        curves.append(curve(trainer))
    assert_same_curves(curves[1], curves[0])
    assert _ATTRIBUTE not in vars(trainer.model.get_base_model())


def test_loss_a_token_does_not_depend_on_batches(new_model: Any, tmp_path: Path) -> None:
    """The trainer's own eval_loss does, with the mixin and without."""
    found: dict[Any, list[dict[str, float]]] = {Trainer: [], TreeTrainer: []}
    for kind, lines in found.items():
        for size in (1, 3):
            args = TrainingArguments(**arguments(tmp_path, per_device_eval_batch_size=size))
            lines.append(kind(new_model(), args, collate, eval_dataset=HELD_OUT).evaluate())
    for ours, theirs in zip(found[TreeTrainer], found[Trainer], strict=True):
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    one, three = found[TreeTrainer]
    assert one["eval_loss"] != pytest.approx(three["eval_loss"], rel=1e-5)
    assert one["eval_loss_per_token"] == pytest.approx(three["eval_loss_per_token"], rel=1e-6)
    whole = collate(HELD_OUT)
    with torch.no_grad():
        expected = float(new_model()(**whole).loss)
    assert one["eval_loss_per_token"] == pytest.approx(expected, rel=1e-5)


def test_metrics_get_their_logits(new_model: Any, tmp_path: Path) -> None:
    def accuracy(predicted: Any) -> dict[str, float]:
        hits = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
        return {"hits": float(hits.sum())}

    results = []
    for kind in (Trainer, TreeTrainer):
        args = TrainingArguments(**arguments(tmp_path))
        trainer: Any = kind(
            new_model(), args, collate, eval_dataset=HELD_OUT, compute_metrics=accuracy
        )
        results.append(trainer.evaluate())
    assert results[1]["eval_hits"] == results[0]["eval_hits"]
    assert results[1]["eval_loss"] == results[0]["eval_loss"]
    assert results[1]["eval_loss_per_token"] > 0


def test_rows_of_a_prompt_come_together(new_model: Any, tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path, eval_strategy="no"))
    seen: list[list[int]] = []

    def noted(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        seen.append([ROWS.index(row) for row in rows])
        return collate(rows)

    GroupedTrainer(new_model(), args, noted, ROWS).train()
    sampler = PrefixSampler(ROWS, 4, order="prompts", seed=3)
    found = [i for batch in seen for i in batch]
    expected = [ROWS.index(ROWS[i]) for _ in range(2) for i in sampler]
    assert found == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "checkpointing": ({"gradient_checkpointing": True}, r"gradient_checkpointing=True \(it must"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    "compile": ({"torch_compile": True}, "torch_compile=True"),
    "noise": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    "bf16": ({"bf16": True}, "bf16=True on float32 weights"),
}


@pytest.mark.parametrize("bad", REFUSED)
def test_arguments_that_are_refused(new_model: Any, tmp_path: Path, bad: str) -> None:
    settings, message = REFUSED[bad]
    args = TrainingArguments(**arguments(tmp_path, eval_strategy="no", **settings))
    with pytest.raises(UserError, match=f"TreeTrainer cannot.*{message}.*leave the mixin out"):
        TreeTrainer(new_model(), args, collate, ROWS)


def test_other_losses_models_and_orders_are_refused(new_model: Any, tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path, eval_strategy="no"))

    class OwnLoss(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class Mixed(TreeTrainerMixin, OwnLoss):
        pass

    with pytest.raises(UserError, match="the compute_loss of OwnLoss"):
        Mixed(new_model(), args, collate, ROWS)
    with pytest.raises(UserError, match="a compute_loss_func of one's own"):
        TreeTrainer(new_model(), args, collate, ROWS, compute_loss_func=lambda *_: None)
    with pytest.raises(UserError, match="falcon models cannot run prefix trees"):
        TreeTrainer(new_model("falcon"), args, collate, ROWS)
    routed = new_model("mixtral")
    routed.get_base_model().config.output_router_logits = True
    with pytest.raises(UserError, match=r"router_aux_loss_coef.*adds a loss of the routers"):
        TreeTrainer(routed, args, collate, ROWS)
    with pytest.raises(UserError, match=r"lora_dropout\.default drops at random"):
        TreeTrainer(new_model(dropout=0.1), args, collate, ROWS).train()
    by_length = TrainingArguments(
        **arguments(tmp_path, eval_strategy="no", train_sampling_strategy="group_by_length")
    )
    with pytest.raises(UserError, match="prefix_order beside train_sampling_strategy"):
        GroupedTrainer(new_model(), by_length, collate, ROWS)


def test_several_processes_are_refused(
    new_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = TrainingArguments(**arguments(tmp_path, eval_strategy="no"))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(UserError, match=r"several processes or GPUs \(it must be one\)"):
        TreeTrainer(new_model(), args, collate, ROWS)


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s>assistant:{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}<s>{{ m.role }}:{{ m.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
WORDS = ("red", "blue", "a long river", "green", "nothing at all", "sun")
TEXTS = [
    {"prompt": f"Say {word}, please: ", "completion": f"{word} {end}"}
    for word in WORDS
    for end in ("it is", "indeed it is", "!")
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Answer in few words."},
            {"role": "user", "content": f"What is {word}?"},
            {"role": "assistant", "content": f"It is {word}."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes" + "!" * k},
        ]
    }
    for word in WORDS
    for k in range(2)
]
# Of which nothing is left but the beginning of the prompt, which is not scored
CUT = [TEXTS[0], {"prompt": "Say " + "again and " * 30, "completion": "no"}, *TEXTS[1:]]
ONE_BY_ONE = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "eval_steps": 9}
TRL: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "completions": (TEXTS, {}),
    "assistants": (CHATS, {"assistant_only_loss": True, "gradient_accumulation_steps": 2}),
    "packed": (TEXTS, {"packing": True, "max_length": 96}),
    "packed, cut": (CUT, {"packing": True, "max_length": 60, "num_train_epochs": 1, **ONE_BY_ONE}),
    "padding-free": (CHATS, {"padding_free": True, "max_length": None}),
}


@pytest.mark.parametrize("kind", TRL)
def test_trainer_of_trl(new_model: Any, tiny_tokenizer: Any, tmp_path: Path, kind: str) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    from datasets import Dataset

    class TreeSFT(TreeTrainerMixin, trl.SFTTrainer):
        pass

    rows, settings = TRL[kind]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    curves = []
    for trainer_class in (trl.SFTTrainer, TreeSFT):
        config = trl.SFTConfig(
            **arguments(tmp_path, **settings), bf16=False, gradient_checkpointing=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = trainer_class(
                new_model(),
                config,
                train_dataset=Dataset.from_list(rows),
                eval_dataset=Dataset.from_list(rows[:5]),
                processing_class=tokenizer,
            )
        batches = list(trainer.get_train_dataloader())
        has_positions = kind.startswith("packed") or kind == "padding-free"
        assert ("position_ids" in batches[0]) == has_positions
        assert (batches[0]["labels"] == IGNORED).any()
        are_bare = [bool((batch["labels"] == IGNORED).all()) for batch in batches]
        assert any(are_bare) == (kind == "packed, cut")
        curves.append(curve(trainer))
    assert_same_curves(curves[1], curves[0])


def test_trl_at_its_defaults_is_told_what_to_change(
    new_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    from datasets import Dataset

    class TreeSFT(TreeTrainerMixin, trl.SFTTrainer):
        pass

    config = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, loss_type="dft"
    )
    message = r"gradient_checkpointing=True \(it must be False\); loss_type='dft'"
    with pytest.raises(UserError, match=message):
        TreeSFT(
            new_model(),
            config,
            train_dataset=Dataset.from_list(TEXTS),
            processing_class=tiny_tokenizer,
        )


def test_names_of_the_losses_that_are_known() -> None:
    """The mixin takes the loss of these classes alone, by their full names."""
    assert f"{Trainer.__module__}.{Trainer.__qualname__}" == module._OWN_LOSSES[0]
    sft = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)").SFTTrainer
    assert f"{sft.__module__}.{sft.__qualname__}" == module._OWN_LOSSES[1]
