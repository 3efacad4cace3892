"""What a study works on, and what of it cannot work: found out before anything trains.

The model is built without its weights, so that shapes, layers, ranks and the number of trained
weights are those of the real one. Every problem is collected; what is not at hand (a model on a Hub
that cannot be reached) is said, and no other model or data ever takes its place.
"""

import copy
import importlib.util
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from swlora.config import BUILTIN_MODEL, DataSpec, ModelSpec, RunSpec
from swlora.errors import UserError
from swlora.paths import expanded, may_be_path
from swlora.study.arms import Arm, arms_of
from swlora.study.spec import StudySpec
from swlora.study.study_file import arm_problems
from swlora.trackers import missing_trackers
from swlora.training.schedule import planned_steps

MANY_STEPS = 1_000_000_000  # where the number of rows is not known
PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate")


@dataclass
class Checked:
    """A study's model (without weights) and data, and what is wrong or not known of them."""

    spec: StudySpec
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    model: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    n_rows: dict[str, int] = field(default_factory=dict)

    @cached_property
    def n_layers(self) -> int | None:
        """The model's number of layers, where it is at hand."""
        from swlora.models.anatomy import Anatomy

        return None if self.model is None else Anatomy(self.model).n_layers

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a study goes on."""
        names = ("data_sha256", "model_revision", "n_layers", "dtype")
        return {name: self.facts[name] for name in names}

    def resolved(self) -> "Checked":
        """Return the same with the dtype that a probe chose, so that all runs have one."""
        model = self.spec.model.model_copy(update={"dtype": self.facts["dtype"]})
        return replace(self, spec=self.spec.model_copy(update={"model": model}))

    def n_trainable(self, arm: Arm, n_steps: int | None = None) -> int | None:
        """Return how many weights an arm trains; None where this cannot be known yet.

        Raises UserError with all reasons why the arm cannot work, in `n_steps` steps if given.
        """
        from swlora.adapters.methods import count_trainable

        if self.model is None:
            return None
        model, layers = copy.deepcopy(self.model), arm.layers or (0,)
        n_steps = n_steps or self.n_steps(arm.settings) or MANY_STEPS
        n_trainable = count_trainable(model, arm.settings.adapter, layers, n_steps=n_steps)
        return n_trainable if arm.layers else None

    def n_steps(self, run: RunSpec, n_rows: int | None = None) -> int | None:
        """Return the optimizer steps of a run on the training data, or on `n_rows` of it.

        Where the number of rows is not known: its limit, or None.
        """
        n_rows = self.n_rows.get("train") if n_rows is None else n_rows
        if n_rows is None:
            return run.train.max_steps
        return planned_steps(run.train, n_rows)

    def rate_steps(self, arm: Arm) -> int | None:
        """Return the optimizer steps of each short run that chooses the arm's learning rate."""
        n_rows, rate = self.n_rows.get("train"), self.spec.rate
        if n_rows is None:
            return None
        n_steps = self.n_steps(arm.settings, min(n_rows, rate.train_rows))
        return min(n_steps or 0, rate.max_steps or MANY_STEPS)

    def shortest_steps(self, arm: Arm) -> int | None:
        """Return the steps of the arm's shortest training, short runs included."""
        n_steps = self.n_steps(arm.settings)
        if n_steps is None or len(arm.rates) == 1:
            return n_steps
        return min(n_steps, self.rate_steps(arm) or n_steps)


def check(spec: StudySpec, *, may_fetch: bool) -> Checked:
    """Look at everything that a study needs; `may_fetch` lets the embedded model be unpacked."""
    checked = Checked(spec)
    checked.problems += missing_trackers(spec.train.report_to)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        checked.problems.append(f"missing packages: {', '.join(missing)}")
        return checked
    tokenizer = _check_model(checked, may_fetch=may_fetch)
    _check_data(checked, tokenizer)
    _check_arms(checked)
    return checked


def _check_model(checked: Checked, *, may_fetch: bool) -> Any:
    """Fill in the model; return its tokenizer, or None where it is not at hand."""
    from swlora.models.load import load_skeleton
    from swlora.models.precision import resolve_device, resolve_dtype

    spec = checked.spec.model
    try:
        if reason := _not_at_hand(spec, may_fetch):
            checked.unchecked.append(reason)
            return None
        device = resolve_device(spec.device)
        loaded = load_skeleton(spec)
    except UserError as error:
        checked.problems.append(f"model: {error}")
        return None
    checked.model = loaded.model
    checked.facts |= {
        "model_source": loaded.source,
        "model_revision": loaded.revision,
        "n_layers": checked.n_layers,
        "dtype": str(resolve_dtype(spec.dtype, device)).removeprefix("torch."),
        "device": str(device),
    }
    return loaded.tokenizer


def _not_at_hand(spec: ModelSpec, may_fetch: bool) -> str | None:
    """Say why a model cannot be looked at here, or None; local mistakes are not found here."""
    from swlora.hub import cached_file, hub_reachable
    from swlora.models.builtin import unpacked_folder

    if spec.name == BUILTIN_MODEL:
        ready = may_fetch or unpacked_folder().is_dir()
        return None if ready else "the model: the embedded one is not unpacked yet"
    path = expanded(spec.name)
    is_local = spec.name.endswith(".gguf") or spec.name.startswith(("/", ".", "~"))
    is_local = is_local or (may_be_path(path) and path.is_dir())
    if is_local or cached_file(spec.name, "config.json", spec.revision) or hub_reachable():
        return None
    return f"the model: {spec.name} is not cached and the Hugging Face Hub cannot be reached"


def _check_data(checked: Checked, tokenizer: Any) -> None:
    """Load the data as runs will, and encode it where the tokenizer is at hand."""
    from swlora.data.hub_data import HubUnreachableError
    from swlora.data.sources import load_dataset

    spec, problems = checked.spec, checked.problems
    try:
        # As runs get it: with every setting named, so that nothing takes the place of the default
        dataset = load_dataset(DataSpec.model_validate(spec.data.model_dump()))
    except HubUnreachableError as error:
        checked.unchecked.append(f"the data: {error}")
        return
    except UserError as error:
        problems.append(f"data: {error}")
        return
    checked.facts |= {"data_source": dataset.source, "data_sha256": dataset.sha256}
    needed = ["train", spec.data.eval_split]
    if any(map(spec.chooses_rate, spec.arms)):
        needed.append("dev")
    for split in dict.fromkeys(needed):
        try:
            examples = dataset.split(split)
            checked.n_rows[split] = len(examples)
            if tokenizer is not None:
                _check_lengths(checked, split, dataset, tokenizer)
        except UserError as error:
            problems.append(f"data: {split} split: {error}")


def _check_lengths(checked: Checked, split: str, dataset: Any, tokenizer: Any) -> None:
    """Raise UserError where rows or generated text would not fit into the model's context."""
    from swlora.data.dataset import asked_of
    from swlora.data.encode import encode_examples
    from swlora.data.known_tokens import check_sequences
    from swlora.evaluation.decode import fitting_prompts
    from swlora.models.anatomy import context_tokens, n_embeddings

    spec, examples = checked.spec, dataset.split(split)
    encoded = encode_examples(
        examples,
        dataset.separator,
        tokenizer,
        context_tokens=context_tokens(checked.model),
        truncate=spec.data.truncate,
        train_on=spec.data.train_on,
        skip_bad_rows=spec.data.skip_bad_rows,
    )
    check_sequences(encoded, examples, tokenizer, n_embeddings(checked.model))
    if split == spec.data.eval_split:
        asked = asked_of(examples, encoded.example_ids).examples
        if not asked:
            raise UserError(
                "documents have no prompts, and a study compares texts: name rows with prompts"
            )
        ways = [spec.decode, *([spec.beam.decode] if spec.beam.arms else [])]
        longest = max(ways, key=lambda way: way.max_new_tokens)  # the other has room where it has
        fitting_prompts(
            checked.model, tokenizer, asked, dataset.separator, longest, truncate=spec.data.truncate
        )


def _check_arms(checked: Checked) -> None:
    """Try every arm on the model without weights, for the shorter of its trainings."""
    spec = checked.spec
    for arm_spec in spec.arms:
        if arm_problems(spec, arm_spec):
            continue  # said already
        try:
            (arm,) = arms_of(spec.model_copy(update={"arms": [arm_spec]}), checked.n_layers)
            checked.n_trainable(arm, checked.shortest_steps(arm))
        except UserError as error:
            checked.problems.append(f"arm {arm_spec.name}: {error}")
