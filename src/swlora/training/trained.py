"""What a training did, as a value."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swlora.models.load import LoadedModel
from swlora.result_json import FLAT, IF_ANY, NO_KEY
from swlora.training.pace import MeanPace
from swlora.training.watch import HeldOutLosses


@dataclass(frozen=True)
class TrainingCourse:
    """How a training went; losses in nats a trained token.

    `rows` are those of the data set, counted once in every epoch; `epochs` is how many of these the
    planned steps begin; `learning_rate` is that of the settings, before warm-up and decay.
    `final_loss` is the mean over the last `final_loss_steps` steps. `held_out` is None where
    nothing was measured, `skipped_steps` where every step had a finite loss and gradient.
    """

    rows: int
    batch_size: int | None
    epochs: int
    steps: int
    planned_steps: int
    learning_rate: float
    train_s: float
    examples_per_s: float
    last_loss: float
    final_loss: float
    final_loss_steps: int
    held_out: HeldOutLosses | None = field(metadata=IF_ANY)
    pace: MeanPace = field(metadata=FLAT)
    skipped_steps: int | None = field(default=None, metadata=IF_ANY)


@dataclass(frozen=True)
class Foreseen:
    """What a training was foreseen to take, and what it took.

    Memory is the peak of the whole process; the seconds are those of all steps and of what is
    measured and saved between them. None is what was not foreseen: memory on a GPU, of padded
    batches and in several processes; time in a run that was over in seconds or went on from a
    checkpoint.
    """

    peak_memory_bytes: int | None
    train_s: float | None
    used_train_s: float
    used_peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Trained:
    """A training: the adapted model, and what was done to it.

    `model` is a PeftModel as it was saved, `loaded` the same with its tokenizer. `adapter`,
    `adapter_bytes`, `loss_figure` and `best_adapter` are None where there is no such file.
    `rank_pattern` is what AdaLoRA's pruning left of each module's rank, None for other methods.
    """

    loaded: LoadedModel = field(metadata=NO_KEY, repr=False, compare=False)
    method: str
    layers: list[int]
    n_trainable: int
    adapter_bytes: int | None
    course: TrainingCourse = field(metadata=FLAT)
    peak_memory_bytes: int | None
    adapter: Path | None
    loss_figure: Path | None
    rank_pattern: dict[str, int] | None = field(default=None, metadata=IF_ANY)
    best_adapter: Path | None = field(default=None, metadata=IF_ANY)
    foreseen: Foreseen | None = field(default=None, metadata=IF_ANY)

    @property
    def model(self) -> Any:
        """The PeftModel."""
        return self.loaded.model
