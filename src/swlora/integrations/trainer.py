"""A mixin that lets a Trainer of transformers, or TRL's SFTTrainer, compute its loss over trees."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from swlora.data.steps import StepOrder
from swlora.errors import UserError
from swlora.integrations.batch_rows import IGNORED, refuse
from swlora.integrations.exactness import base_of, check_model, other_loss
from swlora.integrations.prefix_sampler import PrefixSampler
from swlora.integrations.tree_loss import release, tree_loss
from swlora.loss_sum import LossSum

_TRL = "trl.trainer.sft_trainer.SFTTrainer"
_OWN_LOSSES = ("transformers.trainer.Trainer", _TRL)
# Arguments whose effect on the loss or the model trees do not have, and what they must be
_MUST_BE: dict[str, Any] = {
    "gradient_checkpointing": False,
    "label_smoothing_factor": 0.0,
    "use_liger_kernel": False,
    "torch_compile": False,
    "neftune_noise_alpha": None,
    "activation_offloading": False,
    "loss_type": "nll",
}


class TreeTrainerMixin:
    """Put before Trainer or SFTTrainer, computes the same losses and gradients over prefix trees.

    All else stays the trainer's: data, masks of completions and of assistants, accumulation,
    optimizer, checkpoints, evaluation. What needs logits (`compute_metrics`) is computed by the
    trainer's own forward. An evaluation says `eval_loss_per_token`, too: the mean over all tokens,
    where the trainer's `eval_loss` is a mean over batches, which changes with their size. TRL's
    entropy, token accuracy and token count need the logits, and are left out. The loss of a batch
    without any label is 0 in SFTTrainer, as TRL has it; a Trainer ends there with UserError.

    `prefix_order`: which rows come into a batch together, as of `PrefixSampler` ("prompts",
    "neighbours", "pairs" or "iid"); None leaves that to the trainer. Raises UserError when it is
    made with arguments under which the loss is another one.

        class MyTrainer(swlora.TreeTrainerMixin, SFTTrainer):
            prefix_order = "prompts"
    """

    prefix_order: ClassVar[StepOrder | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held_out = LossSum()
        problems = list(_problems(self))
        if problems:
            name = type(self).__name__
            raise UserError(
                f"{name} cannot compute over trees with {'; '.join(problems)}; change that, or "
                "leave the mixin out"
            )
        check_model(self._own.model)
        if why := other_loss(base_of(self._own.model)):
            refuse(why)

    @property
    def _own(self) -> Any:
        """This object as what the class is mixed into."""
        return self

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, over its tree where nobody asks for the model's outputs."""
        if return_outputs or inputs.get("labels") is None:
            plain: Any = super()
            return plain.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if _next_with(type(self), "compute_loss") == _TRL:
            if num_items_in_batch is None:
                num_items_in_batch = (inputs["labels"][:, 1:] != IGNORED).sum()
            # A batch without labels, such as a long prompt that was cut, has a loss of 0 there.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        unwrapped = self._own.accelerator.unwrap_model(model)
        return tree_loss(unwrapped, **inputs, num_items_in_batch=num_items_in_batch)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return (loss, None, None) where the loss is all that is asked for."""
        inputs = self._own._prepare_inputs(inputs)
        wanted = inputs.get("labels")
        if prediction_loss_only and wanted is not None:
            with torch.no_grad():
                predicted = self.compute_loss(model, inputs), None, None
        else:
            plain: Any = super()
            predicted = plain.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        n_labels = 0 if wanted is None else int((wanted[:, 1:] != IGNORED).sum())
        if n_labels and predicted[0] is not None:
            self._held_out += LossSum(float(predicted[0]) * n_labels, n_labels)
        return predicted

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the trainer does, and add the mean loss over all tokens."""
        self._held_out = LossSum()
        plain: Any = super()
        output = plain.evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._held_out.n_tokens:
            key = f"{metric_key_prefix}_loss_per_token"
            output.metrics[key] = self._held_out.nats_per_token
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does; afterwards let go of what the loss kept for the model."""
        plain: Any = super()
        try:
            return plain.train(*args, **kwargs)
        finally:
            release(self._own.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self._own.train_dataset if train_dataset is None else train_dataset
        if self.prefix_order is None:
            plain: Any = super()
            return plain._get_train_sampler(train_dataset)
        args = self._own.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return PrefixSampler(dataset, args.train_batch_size, order=self.prefix_order, seed=seed)


def _problems(trainer: Any) -> Iterator[str]:
    """Yield what a trainer is asked to do that its loss over trees would not have in it."""
    args = trainer.args
    for name, wanted in _MUST_BE.items():
        value = getattr(args, name, wanted)
        if value != wanted:
            yield f"{name}={value!r} (it must be {wanted!r})"
    if trainer.compute_loss_func is not None:
        yield "a compute_loss_func of one's own"
    if args.n_gpu > 1 or args.world_size > 1 or trainer.is_fsdp_enabled:
        yield "several processes or GPUs (it must be one)"
    weights = str(trainer.model.dtype).removeprefix("torch.")
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(args, name) and weights != dtype:
            yield f"{name}=True on {weights} weights ({name}=False, or load them in {dtype})"
    strategy = getattr(args, "train_sampling_strategy", "random")
    if trainer.prefix_order is not None and strategy != "random":
        yield f"prefix_order beside train_sampling_strategy={strategy!r}"
    owner = _next_with(type(trainer), "compute_loss")
    if owner not in _OWN_LOSSES:
        yield f"the compute_loss of {owner.rpartition('.')[2]}"


def _next_with(trainer_class: type, name: str) -> str:
    """Return the full name of the class behind the mixin that defines a method."""
    order = trainer_class.__mro__
    behind = order[order.index(TreeTrainerMixin) + 1 :]
    owner = next((c for c in behind if name in vars(c)), object)
    return f"{owner.__module__}.{owner.__qualname__}"
