"""Settings that would do nothing beside the others that were given: they are refused.

On the command line they are flags, in Python keyword arguments. One that asks for what happens
anyway is taken: what was asked for is what is done.

A configuration file may hold settings that a command leaves alone, since one file serves several.
"""

from collections.abc import Callable, Collection

from swlora.config import OPTIONAL_SETTINGS, RunSpec, settings_of
from swlora.config.model import KEPT_ABOVE_BYTES, ModelSpec
from swlora.errors import UserError
from swlora.paths import expanded, may_be_path
from swlora.run_place import RESUMABLE
from swlora.settings import flag_name, setting_names

Reason = Callable[[str, RunSpec], str | None]  # of a command: why a setting does nothing, if so


def check_effects(
    command: str,
    spec: RunSpec,
    given: Collection[str],
    *,
    has_folder: bool = True,
    is_shown: bool = True,
) -> None:
    """Raise UserError where a setting of a command would do nothing.

    given: the dotted names of settings that came from flags, which `spec` holds already.
    has_folder, is_shown: whether the work has a run folder, and somebody is told how it goes on; a
    command always has both.
    """
    reasons = _REASONS if has_folder else _REASONS | _without_folder(is_shown=is_shown)
    idle: dict[str, list[str]] = {}
    for setting in given:
        if setting in reasons and (reason := reasons[setting](command, spec)):
            idle.setdefault(reason, []).append(flag_name(setting))
    if idle:
        said = (f"{reason}; leave out {', '.join(flags)}" for reason, flags in idle.items())
        raise UserError("; ".join(said))


def _no_search(command: str, spec: RunSpec) -> str | None:
    policy = spec.adapter.layers
    if command == "identify" or policy.needs_identification:
        return None
    return f"--layers {policy} looks for no super weight (super and super+removal do)"


def _no_prefix_cache(_command: str, spec: RunSpec) -> str | None:
    if spec.train.cache_gb == 0:
        return None
    if (policy := spec.adapter.layers).has_first_layer and spec.adapter.is_settled:
        return f"--layers {policy} adapts the first layer, below which there are no states"
    if spec.train.shard:
        return "--shard runs all layers of a tree in one walk, without kept states"
    return "--engine plain keeps no states" if spec.train.engine == "plain" else None


def _padded(_command: str, spec: RunSpec) -> str | None:
    tries_layers = spec.adapter.layers.time_budget is not None  # with steps of the tree engine
    if spec.train.engine != "plain" or tries_layers:
        return None
    return "--engine plain runs a step as one batch"


def _no_held_out_loss(command: str, spec: RunSpec) -> str | None:
    if command == "train" and spec.train.eval_every_steps == 0:
        return "train uses no held-out row with --eval-every-steps 0"
    return None


def _no_tracker(_command: str, spec: RunSpec) -> str | None:
    return None if spec.train.report_to else "nothing is sent without --report-to"


def _no_samples(_command: str, spec: RunSpec) -> str | None:
    return None if spec.train.sample_prompts else "nothing is generated without --sample-prompts"


def _greedy(command: str, spec: RunSpec) -> str | None:
    samples_by_default = command == "chat" and "temperature" not in spec.decode.model_fields_set
    if spec.decode.temperature > 0 or samples_by_default or spec.decode.top_p == 1:
        return None
    return "nothing is drawn at random with --temperature 0"


def _measured_in_float32(command: str, spec: RunSpec) -> str | None:
    if command == "identify" and spec.model.dtype == "bfloat16":
        return "identify measures weights in float32"
    return None


def _stays_as_it_lies(model: ModelSpec) -> bool:
    """Say whether a model stays in its .gguf file: that was asked for, or the file is large."""
    if model.frozen is not None or not model.name.endswith(".gguf"):
        return model.frozen == "gguf"
    path = expanded(model.name)
    return may_be_path(path) and path.is_file() and path.stat().st_size > KEPT_ABOVE_BYTES


def _no_memory_to_limit(command: str, spec: RunSpec) -> str | None:
    is_training = command in RESUMABLE
    model = spec.trained_model if is_training else spec.model
    if model.memory_gb == 0:
        return None
    if command == "identify":
        return "identify makes no copies of weights"
    if model.device not in ("auto", "cpu"):
        return f"--device {model.device} makes no copies of weights"
    if not _stays_as_it_lies(model) or (is_training and spec.train.engine != "plain"):
        return None  # copies are made, or steps are run in smaller parts
    unlimited = ", and --engine plain runs a step as one batch" if is_training else ""
    return f"{model.name} stays as it lies in its file, without copies of weights{unlimited}"


def _of_another_method(setting: str) -> Reason:
    def reason(_command: str, spec: RunSpec) -> str | None:
        method = spec.adapter.method
        is_without = setting == "dropout" and spec.adapter.dropout == 0
        if is_without or setting in settings_of(method) or not spec.adapter.is_settled:
            return None
        return f"--method {method} has no such setting"

    return reason


def _without_folder(*, is_shown: bool) -> dict[str, Reason]:
    """Return the reasons that count where nothing is written to disk."""

    def no_checkpoint(_command: str, _spec: RunSpec) -> str | None:
        return "without a run folder (output) there are no checkpoints"

    def no_reader(_command: str, spec: RunSpec) -> str | None:
        if is_shown or spec.train.report_to:
            return None
        return "nobody sees samples without a run folder (output), progress=True or --report-to"

    of_checkpoints = ("train.save_every", "train.checkpoint_every_s", "train.keep_checkpoints")
    return {**dict.fromkeys(of_checkpoints, no_checkpoint), "train.sample_prompts": no_reader}


_REASONS: dict[str, Reason] = {
    "model.dtype": _measured_in_float32,
    "model.memory_gb": _no_memory_to_limit,
    "data.eval_split": _no_held_out_loss,
    "data.eval_prompts": _no_held_out_loss,
    "train.row_tokens": _padded,
    "train.cache_gb": _no_prefix_cache,
    "train.project": _no_tracker,
    "train.sample_every": _no_samples,
    "train.sample_tokens": _no_samples,
    "decode.top_p": _greedy,
    **{name: _no_search for name in setting_names(RunSpec) if name.startswith("identify.")},
    **{f"adapter.{name}": _of_another_method(name) for name in OPTIONAL_SETTINGS},
}
