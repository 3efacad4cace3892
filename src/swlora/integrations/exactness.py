"""Which models, in which state, a prefix tree reproduces exactly; what does not is refused."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from swlora.errors import UnknownFamilyError, UserError
from swlora.integrations.batch_rows import refuse
from swlora.models.anatomy import Anatomy, context_tokens
from swlora.models.sharded_weight import has_sharded

# What modules keep as a number and draw by in their forward (OPT, Phi-3, Llama; Mixtral's routers)
_RANDOM = ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "jitter_noise")


def base_of(model: Any) -> Any:
    """Return the model below a PeftModel, or the model itself.

    Raises UserError for what is neither a PeftModel nor a model of transformers.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        name = type(model).__name__
        raise UserError(
            f"a model of transformers or PEFT is needed, not a {name}; {_instead_of(model)}"
        )
    return base


def _instead_of(model: Any) -> str:
    """Say what to do with an object that is none of the models that are taken."""
    if isinstance(model, DistributedDataParallel):
        return "patch the model before it is wrapped; tree_loss works inside its forward alone"
    if isinstance(model, DataParallel):
        return "the drop-ins work on one device, where it is not needed"
    return "unwrap it first"


def anatomy_of(base: Any) -> Anatomy:
    """Return the anatomy of a model that can run prefix trees; UserError for all others."""
    try:
        anatomy = Anatomy(base)
    except UnknownFamilyError as error:
        refuse(str(error))
    if not anatomy.family.has_attention_interface:
        refuse(f"{base.config.model_type} models cannot run prefix trees")
    return anatomy


def check_model(model: Any) -> None:
    """Raise UserError for a model whose loss is not what a prefix tree computes."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    base = base_of(model)
    anatomy = anatomy_of(base)
    if why := unreadable_weights(base):
        refuse(why)
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            refuse(f"adapter {name!r} ({config.peft_type.value}) depends on where a token stands")
    if isinstance(model, PeftModel) and type(model.base_model).forward is not BaseTuner.forward:
        # AdaLoRA's adds to the loss how far its matrices are from orthogonal ones.
        tuner = type(model.base_model).__name__
        refuse(f"PEFT's {tuner} has a forward of its own, which may add to the loss")
    attention = anatomy.family.attention_out.rpartition(".")[0]
    if any(block.get_submodule(attention).config is not base.config for block in anatomy.blocks):
        refuse("a block has a configuration of its own, as PEFT's layer_replication gives it, and "
               "would not attend along a tree")  # fmt: skip
    for name in trained_outside_blocks(base, anatomy):
        refuse(f"{name} is trained, and only weights of the decoder's blocks may be")


def unreadable_weights(base: Any) -> str | None:
    """Say why the fast forwards cannot read a model's weights where they are; None if they can."""
    if getattr(base, "quantization_method", None) or getattr(base, "hf_quantizer", None):
        return "the weights are quantised by another library"
    if has_sharded(base) or any(hasattr(module, "_hf_hook") for module in base.modules()):
        return "the weights lie on several devices, or in other processes"
    return None


def trained_outside_blocks(base: Any, anatomy: Anatomy) -> Iterator[str]:
    """Yield the names of trained parameters that are in no block of the decoder."""
    inside = {id(p) for block in anatomy.blocks for p in block.parameters()}
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            yield name


def other_loss(base: Any) -> str | None:
    """Say what else than the mean of -log p the loss of a model is; None if it is that."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not _is_of_transformers(type(base).forward):
        return "the model has a forward of its own, which may add to the loss"
    if base.loss_function is not ForCausalLMLoss:
        return "the model has a loss function of its own"
    if getattr(base.config, "output_router_logits", False):
        return "output_router_logits (TRL: router_aux_loss_coef) adds a loss of the routers"
    return None


def _is_of_transformers(forward: Any) -> bool:
    """Say whether a method comes from transformers, with all that decorates it.

    A decorator names the module of what it decorates as its own; its globals do not.
    """
    while forward is not None:
        module = getattr(forward, "__globals__", {}).get("__name__", "")
        if module.partition(".")[0] != "transformers":
            return False
        forward = getattr(forward, "__wrapped__", None)
    return True


def check_processes(base: Any) -> None:
    """Raise UserError where gradients would differ between processes: nobody averages them.

    In the forward of DistributedDataParallel, such as that of a Lightning module, it does.
    """
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    if is_alone or distributed.get_world_size() == 1 or not torch.is_grad_enabled():
        return
    around = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if around is None or all(module is not base for module in around.modules()):
        refuse("several processes are at work, and their gradients are averaged in the forward of "
               "what DistributedDataParallel wraps alone; call it there")  # fmt: skip


def check_mode(model: Any, base: Any) -> None:
    """Raise UserError where the loss is not that of the weights alone: dropout, another loss."""
    if why := other_loss(base):
        refuse(why)
    if base.training and getattr(base.get_input_embeddings(), "neftune_noise_alpha", None):
        refuse("NEFTune adds noise to the embeddings")
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            refuse("gradient checkpointing is on, and trees run without it; turn it off")
        if module.training and _drops(module):
            refuse(f"{name} drops at random while the model is in training mode")


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    values = (vars(module).get(name) for name in _RANDOM)
    return any(isinstance(value, float) and value > 0 for value in values)


def check_length(base: Any, n_positions: int) -> None:
    """Raise UserError for rows beyond the context, where "dynamic" rotary angles change."""
    rope = getattr(base.config, "rope_parameters", None) or {}
    is_dynamic = any("dynamic" in str(value) for value in rope.values())
    if is_dynamic and n_positions > (context := context_tokens(base)):
        refuse(f"{n_positions} tokens are more than the model's context of {context}")


def in_weights_dtype(base: Any) -> AbstractContextManager[Any]:
    """Return a context without autocast, which changes nothing where it has the weights' dtype.

    Raises UserError where it has another one.
    """
    device = base.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    asked, own = torch.get_autocast_dtype(device), base.dtype
    if asked != own:
        names = [str(dtype).removeprefix("torch.") for dtype in (asked, own)]
        raise UserError(
            f"autocast to {names[0]} is on and the weights are {names[1]}: leave it out (in a "
            f"trainer's arguments, too), or load the model with dtype=torch.{names[0]}"
        )
    return torch.autocast(device, enabled=False)
