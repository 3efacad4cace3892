"""A model whose frozen weights are divided over the processes of a training (FSDP2).

    block, embedding     gathered by FSDP2's hooks when they are called, freed after forward, and
                         gathered again for the block's backward
    head                 gathered by whoever multiplies with it, also where it is the embedding's

No process ever holds the whole model: modules are made without content, and each reads its own rows
of every weight from the files. An adapter is attached to what this returns, so that FSDP2 does not
know of it: its weights, gradients and moments are whole in every process.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GenerationConfig

from swlora.config import ModelSpec
from swlora.errors import UserError
from swlora.memory import keep_freed_memory, release_pages
from swlora.models.anatomy import Anatomy
from swlora.models.declared_size import check_declared_size
from swlora.models.finite import check_finite
from swlora.models.load import LoadedModel, load_skeleton, settle_process
from swlora.models.local_files import local_files
from swlora.models.model_folder import check_model_folder
from swlora.models.precision import resolve_device, resolve_dtype
from swlora.models.sharded_weight import as_part, is_sharded, own_rows
from swlora.models.weight_source import SafetensorsWeights
from swlora.plural import counted
from swlora.processes import from_main, world

# Gathered weights come and go in sizes that leave holes in kept memory: with 1.1 B weights in two
# processes, each grew to 8.4 GB, nearly four times what the whole model takes.
KEPT_BELOW_BYTES = 1 << 20


def load_sharded_model(spec: ModelSpec) -> LoadedModel:
    """Load this process's part of what `spec` names, as `load_model` loads the whole.

    All processes do so together. Raises what `load_model` raises, and UserError for a single
    process and for models whose weights cannot be read row by row.
    """
    if not world().is_shared:
        raise UserError(
            "--shard divides a model over several processes, and this is a single one: start "
            "torchrun --nproc-per-node N -m swlora train ..., or give --no-shard"
        )
    settle_process(spec)
    keep_freed_memory(KEPT_BELOW_BYTES)
    device = resolve_device(spec.device)
    dtype = resolve_dtype(spec.dtype, device)
    skeleton = load_skeleton(spec)
    _check(skeleton)
    from_main(lambda: str(local_files(skeleton)))  # of the Hub: one process of all fetches first
    folder = local_files(skeleton)
    check_model_folder(folder)
    check_declared_size(folder)
    model = _without_weights(skeleton.model.config, dtype)
    weights = SafetensorsWeights(folder)
    if missing := sorted({name for name, _ in model.named_parameters()}.difference(weights.names)):
        raise UserError(
            f"the model {skeleton.name} lacks {counted(len(missing), 'weight')}, such as "
            f"{missing[0]}"
        )
    mesh = init_device_mesh(device.type, (world().size,))
    shard(model, mesh)
    fill(model, weights, mesh, device)
    check_finite(model, skeleton.source)
    model.generation_config = GenerationConfig()
    return replace(skeleton, model=model.eval())


def _check(skeleton: LoadedModel) -> None:
    """Raise UserError for a model that cannot be read by rows, or run in trees."""
    family, config = Anatomy(skeleton.model).family, skeleton.model.config
    name = config.model_type
    if skeleton.name.endswith(".gguf"):
        raise UserError(
            f"--shard reads safetensors, and {Path(skeleton.name).name} is a .gguf file: name the "
            "folder or Hub id of the model that it was made of, or leave --shard out"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"--shard cannot divide quantised weights, which {skeleton.name} has")
    if family.experts is not None:
        raise UserError(f"--shard cannot divide the experts of {name} models; leave it out")
    if not family.has_attention_interface:
        raise UserError(f"--shard needs prefix trees, which {name} models cannot run; leave it out")


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """Return a model whose parameters have no content; its buffers are computed as ever."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # it has given every name a parameter of its own
    return model.requires_grad_(False)


def shard(model: Any, mesh: Any) -> None:
    """Divide the parameters of a model over the processes of a mesh of one dimension."""
    anatomy, embedding = Anatomy(model), model.get_input_embeddings()
    head: Any = anatomy.head
    is_tied = head.weight is embedding.weight
    # GPT-2's returns one; nobody writes to it.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for module in (*anatomy.blocks, embedding, anatomy.backbone):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if is_tied:
        head.weight = embedding.weight
    else:
        rows = head.weight[own_rows(len(head.weight), mesh)]
        part = as_part(rows, head.weight, mesh)
        head.weight = nn.Parameter(part, requires_grad=False)


def fill(model: Any, weights: SafetensorsWeights, mesh: Any, device: torch.device) -> None:
    """Give the parameters of a sharded model their values, each process its own rows."""
    places = {id(parameter): list[tuple[nn.Module, str]]() for parameter in model.parameters()}
    for module, name, parameter in _own_parameters(model):
        places[id(parameter)].append((module, name))
    for full_name, parameter in list(model.named_parameters()):
        rows = own_rows(len(parameter), mesh) if is_sharded(parameter) else slice(None)
        stored = weights.rows(full_name, rows)
        own = stored.to(device, parameter.dtype, copy=True)
        release_pages([stored])
        value: Tensor = as_part(own, parameter, mesh) if is_sharded(parameter) else own
        filled = nn.Parameter(value, requires_grad=False)
        for module, name in places[id(parameter)]:  # a tied head's, too
            module.register_parameter(name, filled)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield every parameter by the modules that hold it: one that is shared, several times."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter
