"""A job: one configuration at work, with the model and the data that it needs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.config import SAMPLE_DATASET, ModelSpec, RunSpec
from swlora.data.dataset import Dataset
from swlora.data.sources import load_dataset
from swlora.errors import UserError
from swlora.layer_policy import VerifiedLayers
from swlora.models.load import LoadedModel, check_model, load_model, load_skeleton, settled_model
from swlora.plural import counted
from swlora.progress import Progress
from swlora.result_json import as_json
from swlora.run_record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from swlora.data.encode import Encoded
    from swlora.trackers import Trackers
    from swlora.training.callbacks import Callback

TOKENIZER_OF_START = "tokenizer_of_start"  # a fact of runs that took it from there
COMPUTES = "computes"  # a fact of trainings: in what


@dataclass
class Job:
    """One configuration at work, with or without a run folder; loads what is used when it is."""

    spec: RunSpec
    run: RunRecord
    progress: Progress
    verify: bool = False  # the model's files, whole
    callbacks: Sequence["Callback"] = ()  # told of every step of a training
    trackers: "Trackers | None" = None  # that it reports to just now
    _encoded: dict[tuple[str, int | None], "Encoded"] = field(default_factory=dict)
    _tokenizer_of: Path | None = None  # the adapter whose tokenizer is taken

    def __post_init__(self) -> None:
        """Take model and tokenizer of the adapter that a training starts from."""
        start, facts = self.spec.adapter.start, self.run.facts
        if not facts.get("resumed"):
            self.take_base_of(start)
        elif start is not None and facts.get(TOKENIZER_OF_START) and start.is_dir():
            self.take_base_of(start)  # wherever it lies now; older runs have the base's

    def take_base_of(self, adapter: Path | None) -> None:
        """Take the tokenizer of an adapter, and its model, each where none is named.

        The tokenizer is no part of `spec`: nobody asked for it, and the adapter may be moved.
        Raises UserError where there is no such folder, or its model is not found.
        """
        if adapter is None:
            return
        from swlora.adapters.on_base import base_spec
        from swlora.adapters.saved import adapter_folder

        folder = adapter_folder(adapter)
        if self.spec.model.tokenizer is None:
            self._tokenizer_of = folder
        base = base_spec(folder, self.spec.model)
        self.spec = self.spec.model_copy(update={"model": base})

    def _to_load(self, model: ModelSpec) -> ModelSpec:
        """Return a model with the tokenizer of the adapter that is at work."""
        if self._tokenizer_of is None:
            return model
        from swlora.adapters.on_base import with_own_tokenizer

        if self.spec.adapter.start is not None:
            self.run.record(**{TOKENIZER_OF_START: True})
        return with_own_tokenizer(self._tokenizer_of, model)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model; in float32 where a search for super weights comes before a training."""
        return self._load("float32" if self.will_identify else None)

    @property
    def will_identify(self) -> bool:
        """Whether the layers need a search for super weights that this run has not made yet."""
        return self.spec.adapter.layers.needs_identification and self.verified_layers() is None

    def verified_layers(self) -> VerifiedLayers | None:
        """Return the layers that an identification of this run found; None before there is one."""
        found = self.run.read_result().get("identify")
        return VerifiedLayers(found["layers"], found["removal_layers"]) if found else None

    def note_computing(self) -> None:
        """Record the kind of device and the dtype that a training computes in, "cuda, bfloat16".

        Raises UserError where a run that goes on began with others, as `auto` may find them on
        another machine. Runs of older versions have noted none. The dtype is the one that is asked
        for: a search before the training may have the model in float32.
        """
        from swlora.models.precision import resolve_dtype

        device = self.loaded.model.device
        dtype = resolve_dtype(self.spec.model.dtype, device)
        computes = f"{device.type}, {str(dtype).removeprefix('torch.')}"
        self.run.record_source(**{COMPUTES: computes})

    def loaded_in_float32(self) -> LoadedModel:
        """Return the model in float32, whatever was asked for: its weights are to be measured."""
        if "loaded" not in vars(self):
            self.loaded = self._load("float32")
        return self.loaded

    def load_skeleton(self) -> None:
        """Take the model without its weights: that is enough to encode data, and quick."""
        with self.progress.task("load the tokenizer"):
            self.loaded = load_skeleton(self._to_load(self.spec.model))
        self.progress.say(f"model: {self.loaded.source}")

    @cached_property
    def identification_windows(self) -> "Tensor":
        """The text that an identification measures, token ids (n, window_tokens); read once.

        Raises UserError where the model has no room for it, or for the prompts of the search.
        """
        from swlora.superweights import identify as identification

        return identification.check(self.loaded_in_float32(), self.spec.identify)

    def _load(self, dtype: str | None) -> LoadedModel:
        spec = self.spec.trained_model if dtype is None else self.spec.model.searchable
        with self.timed("load_model"), self.progress.task("load the model"):
            loaded = load_model(self._to_load(spec), dtype=dtype)
        self._note_model(loaded)
        return loaded

    def take(self, loaded: LoadedModel) -> None:
        """Work with a model that is loaded already."""
        self.loaded = loaded
        self._note_model(loaded)

    def load_shard(self) -> None:
        """Take this process's part of the model, which all processes hold together."""
        from swlora.models.sharded import load_sharded_model

        with self.timed("load_model"), self.progress.task("load this process's part of the model"):
            self.loaded = load_sharded_model(self._to_load(self.spec.model))
        self._note_model(self.loaded)

    def _note_model(self, loaded: LoadedModel) -> None:
        self.progress.say(f"model: {loaded.source}")
        name = settled_model(self.spec.model).name
        self.run.record_source(model=name, model_revision=loaded.revision)
        self.run.record(model_source=loaded.source)
        if self.run.folder is not None:
            self._record_weight_files(loaded)

    def _record_weight_files(self, loaded: LoadedModel) -> None:
        """Record sizes and dates of the model's files, and with `verify` what is in them.

        They are hashed again where a run that goes on finds one that was written since.
        """
        from swlora.models.provenance import WHOLE, sizes_and_dates, weight_paths, whole_hashes

        paths, facts = weight_paths(loaded), self.run.facts
        now, before = sizes_and_dates(paths), facts.get("weight_files")
        was_hashed = any(name.startswith(WHOLE) for name in facts)
        was_written = before is not None and before != now
        if was_written and not (was_hashed or self.verify):
            self.progress.say(
                "the model's files were written since this run began; a sample of their weights is "
                "compared (--verify in the beginning has them compared whole)"
            )
        if self.verify or (was_hashed and was_written):
            with self.timed("verify"), self.progress.task("hash the model's files"):
                hashes = whole_hashes(paths)
            self.run.record_source(**hashes)
            if self.verify and facts.get("resumed") and not was_hashed:
                self.progress.say("the model's files are hashed from here on, not since the start")
        self.run.record(weight_files=now)

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, announced by its source."""
        if "loaded" not in vars(self):
            check_model(self.spec.model)  # may be mistyped: before the data, which may be long
        with self.timed("load_data"), self.progress.task("load the data"):
            dataset = load_dataset(self.spec.data)
        share = self.spec.data.eval_share
        if share is not None and not dataset.has("dev") and not self.run.facts.get("resumed"):
            raise UserError(
                f"{self.spec.data.name} is one document, so none can be held out: leave out "
                "--eval-share, or give --eval-file"
            )
        self.progress.say(f"data: {dataset.source}")
        for reason, n in dataset.counts.bad.items():
            self.progress.say(f"bad rows left out: {n:,} ({reason})")
        self.run.record_source(data_sha256=dataset.sha256)
        self.run.record(
            data_source=dataset.source,
            is_sample=dataset.is_sample,
            n_skipped_rows=dataset.counts.n_bad,
        )
        return dataset

    def encoded(self, split: str, n_rows: int | None = None) -> "Encoded":
        """Return a split, or its first rows, as token ids; rows that are cut are counted and said.

        They are encoded once. Raises UserError where there is no such split.
        """
        from swlora.data.chat_end import notes_on_chats
        from swlora.data.encode import encode_examples
        from swlora.data.known_tokens import check_sequences
        from swlora.models.anatomy import n_embeddings

        if (split, n_rows) in self._encoded:
            return self._encoded[split, n_rows]
        rows, train_on = self.dataset.split(split)[:n_rows], self.spec.data.train_on
        if split == "train":
            n_looked_at = 1000 if train_on == "all-turns" else None  # rows may lie in a long file
            if any(e.messages for e in islice(rows, n_looked_at)):
                for note in notes_on_chats(self.loaded.tokenizer):
                    self.progress.say(note)
            elif n_looked_at is None:
                raise UserError(f"--train-on {train_on}: no row is a chat; leave it out")
        with self.timed("tokenise"), self.progress.task(f"tokenise the {split} rows"):
            encoded = encode_examples(
                rows,
                self.dataset.separator,
                self.loaded.tokenizer,
                context_tokens=self.loaded.context_tokens,
                truncate=self.spec.data.truncate,
                train_on=train_on,
                skip_bad_rows=self.spec.data.skip_bad_rows,
            )
            n_known = n_embeddings(self.loaded.model)
            check_sequences(encoded, rows, self.loaded.tokenizer, n_known)
        if encoded.n_cut:
            self.progress.say(
                f"cut to the context: {counted(encoded.n_cut, 'row')} of the {split} split"
            )
            self.run.record(**{f"n_cut_rows_{split}": encoded.n_cut})
        for reason, n in encoded.bad.items():
            self.progress.say(f"bad rows of the {split} split left out: {n:,} ({reason})")
        if encoded.bad:
            self.run.record(**{f"bad_rows_{split}": encoded.bad})
        self._encoded[split, n_rows] = encoded
        return encoded

    def begin(self) -> None:
        """Make the run folder: what was asked for can be done, and takes its time from here on.

        Its configuration names the model and the data that are used, so that a run that was left
        its defaults goes on with the same ones.
        """
        spec = self.spec
        model, data = settled_model(spec.model), spec.data
        if "dataset" in vars(self) and self.dataset.is_sample:
            data = data.model_copy(update={"name": SAMPLE_DATASET})
        self.run.begin(spec.model_copy(update={"model": model, "data": data}))

    def record_result(self, result: Any) -> None:
        """Record what a short command came to: its run begins when its work is done."""
        self.run.begin()
        self.run.write_result(as_json(result))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to the run's timings."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.run.add_timing(name, time.perf_counter() - start_s)
