"""Models at hand: load, generate, and make files of them for other programs."""

from typing import TYPE_CHECKING, Literal, Unpack, overload

from swlora.api.at_hand import model_at_hand
from swlora.api.bars import shown
from swlora.api.call import Call, PathLike, ShowProgress, path_of, takes_settings
from swlora.api.settings import ExportSettings, GenerateSettings, LoadSettings, MergeSettings
from swlora.command_settings import check_processes
from swlora.errors import UserError

if TYPE_CHECKING:
    from swlora.deploy.gguf_export import Exported
    from swlora.deploy.merge import Merged
    from swlora.evaluation.prompting import Generated
    from swlora.models.load import LoadedModel


@takes_settings("load")
def load(
    adapter: PathLike | None = None,
    *,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[LoadSettings],
) -> "LoadedModel":
    """Load a model and its tokenizer, with the adapter in a folder on it if one is named.

    The weights are frozen and in evaluation mode; with an adapter (a run folder will do) `model` is
    a PeftModel. Weights are read from safetensors or GGUF only, and no code of a repository is run.

    Raises UserError where there is no such model or adapter, or the two do not belong together.

    Examples:
        >>> import swlora
        >>> loaded = swlora.load(model="builtin", dtype="float32")
        >>> loaded.model.dtype, loaded.model.training
        (torch.float32, False)
    """
    from swlora.adapters.on_base import load_with_adapter

    spec = Call.of("load", config, settings).spec()
    return load_with_adapter(spec.model, path_of(adapter), shown(progress).say)


@overload
def generate(
    prompt: str,
    *,
    model: "PathLike | LoadedModel | None" = None,
    adapter: PathLike | None = None,
    chat: bool | None = None,
    system: str | None = None,
    output: PathLike | None = None,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[GenerateSettings],
) -> "Generated": ...


@overload
def generate(
    prompt: list[str] | tuple[str, ...],
    *,
    model: "PathLike | LoadedModel | None" = None,
    adapter: PathLike | None = None,
    chat: bool | None = None,
    system: str | None = None,
    output: PathLike | None = None,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[GenerateSettings],
) -> "list[Generated]": ...


@takes_settings("generate")
def generate(
    prompt: str | list[str] | tuple[str, ...],
    *,
    model: "PathLike | LoadedModel | None" = None,
    adapter: PathLike | None = None,
    chat: bool | None = None,
    system: str | None = None,
    output: PathLike | None = None,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[GenerateSettings],
) -> "Generated | list[Generated]":
    """Continue a prompt, or answer it (`chat`), as `swlora generate` does; or several at once.

    A list of prompts gives a list, made in batches. `model` may be one that `load` or `train` made
    (`trained.loaded`), which saves loading it again; its adapter is on it then. `chat` None leaves
    it to the adapter: one that was trained on chats answers. `system` is a turn before the prompt.

    Raises UserError for a prompt that leaves no room in the model's context, and for a chat where
    the tokenizer has no template.

    Examples:
        >>> import swlora
        >>> loaded = swlora.load(model="builtin")
        >>> texts = swlora.generate(["good day", "hello"], model=loaded, max_new_tokens=2)
        >>> len(texts), texts[0].prompt
        (2, 'good day')
    """
    from swlora.adapters.on_base import load_with_adapter
    from swlora.adapters.temporary import evaluating
    from swlora.evaluation.prompting import Prompt, check_form, generate_texts

    texts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not texts:
        raise UserError("there is no prompt in the list")
    if not all(isinstance(text, str) for text in texts):
        raise UserError("a prompt is a text, or a list of texts")
    prompts = [Prompt(text, chat, system) for text in texts]
    check_form(prompts[0])
    given = model_at_hand(model, settings, adapter)
    call = Call.of("generate", config, {**settings, "model": None if given else model}, given)
    with call.job(output, progress) as job:
        loaded = given or load_with_adapter(job.spec.model, path_of(adapter), job.progress.say)
        with evaluating(loaded.model):
            generated = generate_texts(job.spec, prompts, loaded, job.progress)
        if isinstance(prompt, str):
            job.record_result(generated[0])
            return generated[0]
        job.record_result({"texts": generated})
    return generated


@takes_settings("merge")
def merge(
    adapter: PathLike,
    output: PathLike,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shard_gb: float = 5.0,
    force: bool = False,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[MergeSettings],
) -> "Merged":
    """Add an adapter to its base's weights and check the result, as `swlora merge` does.

    `output` is the folder of the merged model, new or empty; `dtype` that of its weights, the
    base's own by default; a file holds `shard_gb` at most. Without `model` the base is the one that
    the adapter was trained on; `force` takes another. The result says how far the merged model
    agrees with base and adapter on held text (`kl_nats_per_token`).

    Raises UserError for what does not fit together, and RunFailedError where the merged model is
    not base and adapter: then nothing is kept.

    Examples:
        >>> import swlora
        >>> trained = swlora.train(
        ...     model="builtin", dataset="sample", train_rows=40, layers="last:1", max_steps=3,
        ...     output="runs/to-merge",
        ... )
        >>> merged = swlora.merge("runs/to-merge", "merged", model="builtin")
        >>> merged.kl_nats_per_token <= merged.tolerance_kl_nats_per_token
        True
    """
    from swlora.deploy.merge import merge as merge_adapter
    from swlora.deploy.merge import merge_request

    check_processes("merge")
    model = Call.of("merge", config, settings).spec().model
    folders = path_of(adapter), path_of(output)
    request = merge_request(*folders, model, dtype, shard_gb, force=force)
    return merge_adapter(request, shown(progress))


@takes_settings("export")
def export(
    gguf: PathLike | None = None,
    *,
    gguf_lora: PathLike | None = None,
    adapter: PathLike | None = None,
    type: Literal["f32", "f16", "bf16", "q8_0"] | None = None,
    base_gguf: PathLike | None = None,
    llama_cpp: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[ExportSettings],
) -> "Exported":
    """Write a model, or a LoRA alone, as a GGUF file for llama.cpp, as `swlora export` does.

    `gguf` is the file of the model, `gguf_lora` that of the LoRA in the folder `adapter` (merge it
    first to have it in the model). `type` is f16 by default, of a LoRA f32; `base_gguf` a file that
    gives metadata and tokenizer; `llama_cpp` the folder of node-llama-cpp, in which the file is run
    before it gets its name. The result says how far it agrees with the model (`check`).

    Raises UserError for what llama.cpp cannot hold, and RunFailedError where the file computes
    something else than the model: then it is not kept.

    Examples:
        >>> import swlora
        >>> exported = swlora.export("mine.gguf", model="builtin", type="f16")
        >>> exported.architecture, exported.type
        ('llama', 'f16')
    """
    from swlora.deploy.export_request import export_request
    from swlora.deploy.gguf_export import export as export_model

    check_processes("export")
    paths = (path_of(given) for given in (gguf, gguf_lora, adapter, base_gguf, llama_cpp))
    request = export_request(Call.of("export", None, settings).spec().model, *paths, kind=type)
    return export_model(request, shown(progress))
