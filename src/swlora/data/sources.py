"""Where examples come from: files, folders and globs of them, the Hub, E2E NLG, the sample.

Every source ends as one `Dataset` of `Example`s with the text untouched; how a prompt becomes
tokens is `encode`'s business. What was loaded, and why, is said in `Dataset.source`.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from swlora.config import DEFAULT_DATASET, SAMPLE_DATASET, DataSpec
from swlora.data.dataset import Dataset, number_prompts
from swlora.data.e2e import E2E_FILES, E2E_FOLDER_VARIABLE, load_e2e_folder, load_e2e_hub
from swlora.data.examples import Example, keep, select
from swlora.data.files import data_files, split_files
from swlora.data.forms import Recogniser
from swlora.data.hub_data import HubData, HubUnreachableError, hub_commit
from swlora.data.records import READERS, ending
from swlora.data.rows import Row, Rows, collect_rows, dataset_of, read_files, recognise
from swlora.data.sample import make_sample
from swlora.errors import DataError, UserError
from swlora.paths import expanded, may_be_path
from swlora.settings import flag_name

SAMPLE_SOURCE = "the built-in sample (made from a grammar; not E2E)"
DEFAULT_SHARE = 0.05
NO_ROWS = Rows((), {})
_OF_FILES = ("eval_file", "eval_share", "columns", "prompt_column", "completion_column")
_OF_HUB = ("train_split", "config_name", "dataset_revision")
_HUB_ID = r"[\w][\w.-]*/[\w.-]+"


def load_dataset(spec: DataSpec) -> Dataset:
    """Load what `spec.name` names and keep the rows that its limits allow.

    The default Hub id is read from the folder in SWLORA_E2E, if set, else from the Hub. Where no
    data were named and the Hub cannot be reached, the sample takes their place, and `source` says
    so. Raises UserError for a name that is no source, HubUnreachableError for data that were named
    and cannot be had, DataError for rows that cannot be used.
    """
    dataset = _load(spec)
    return dataset.limited(spec.train_rows, spec.train_prompts, spec.eval_prompts)


def _load(spec: DataSpec) -> Dataset:
    path = expanded(spec.name)
    if spec.name in (SAMPLE_DATASET, DEFAULT_DATASET):
        _refuse_settings(spec, (*_OF_FILES, *_OF_HUB))
        return _load_sample(SAMPLE_SOURCE) if spec.name == SAMPLE_DATASET else _load_default(spec)
    if may_be_path(path) and path.is_dir() and any((path / name).is_file() for name in E2E_FILES):
        _refuse_settings(spec, (*_OF_FILES, *_OF_HUB))
        return load_e2e_folder(path, spec.skip_bad_rows)
    files = data_files(spec.name)
    if files:
        _refuse_settings(spec, _OF_HUB)
        return _load_files(files, spec)
    if re.fullmatch(_HUB_ID, spec.name, re.ASCII) and not ending(path):
        return _load_hub(spec)
    raise UserError(
        f"no data set {spec.name!r:.99}: give a file ({', '.join(READERS)}), a folder of such, a "
        f"Hub id such as {DEFAULT_DATASET}, or {SAMPLE_DATASET}"
    )


def _refuse_settings(spec: DataSpec, names: tuple[str, ...]) -> None:
    """Raise UserError for a setting that does nothing with the data that were named."""
    given = [name for name in names if getattr(spec, name) != getattr(DataSpec(), name)]
    if given:
        kind = "data of the Hub" if given[0] in _OF_HUB else "files of your own"
        raise UserError(f"{flag_name(f'data.{given[0]}')} is for {kind}, not for {spec.name}")


# E2E and the sample


def _load_default(spec: DataSpec) -> Dataset:
    if folder := os.environ.get(E2E_FOLDER_VARIABLE):
        try:
            return load_e2e_folder(expanded(folder), spec.skip_bad_rows)
        except UserError as error:
            raise type(error)(f"{E2E_FOLDER_VARIABLE}: {error}") from error
    try:
        return load_e2e_hub(spec.skip_bad_rows)
    except HubUnreachableError as error:
        hint = f"set {E2E_FOLDER_VARIABLE} to a folder with the E2E files to use those"
        if "name" in spec.model_fields_set:
            raise HubUnreachableError(
                f"{DEFAULT_DATASET} cannot be loaded, since {error}; {hint}, or give --dataset "
                f"{SAMPLE_DATASET}"
            ) from error
        return _load_sample(f"{SAMPLE_SOURCE}, since {error}; {hint}")


def _load_sample(source: str) -> Dataset:
    parts = [Rows(keep(Example(mr, ref) for mr, ref in pairs), {}) for pairs in make_sample()]
    return dataset_of(SAMPLE_DATASET, source, parts, separator="\n")


# Files and the Hub


def _load_files(files: list[Path], spec: DataSpec) -> Dataset:
    by_split = split_files(files, expanded(spec.name))
    recogniser = Recogniser(spec.named_columns)
    parts = {
        split: read_files(of_split, recogniser, spec.skip_bad_rows)
        if of_split and _is_read(split, spec)
        else NO_ROWS
        for split, of_split in by_split.items()
    }
    named = str(files[0]) if len(files) == 1 else f"{len(files)} files of {spec.name}"
    source = f"rows of {named}"
    return _with_held_out(Path(spec.name).name, source, parts, spec, recogniser)


def _load_hub(spec: DataSpec) -> Dataset:
    commit = hub_commit(spec.name, spec.dataset_revision)
    data = HubData(spec.name, spec.config_name, commit)
    recogniser = Recogniser(spec.named_columns)

    def rows(names: Sequence[str]) -> Iterator[Row]:
        for name in names:
            records = enumerate(data.records(name), start=1)
            yield from recognise(records, recogniser, f"{spec.name} {name}, row", table=spec.name)

    names = {"train": [spec.train_split]}
    for split in ("dev", "test"):
        names[split] = [name for name in data.split_names(split) if name != spec.train_split]
    limits = {"train": _n_rows_read(spec, has_dev=bool(names["dev"]))}
    parts = {
        split: collect_rows(
            rows(own), f"{spec.name} {own[0]}, row 1", spec.skip_bad_rows, limits.get(split)
        )
        if own and _is_read(split, spec)
        else NO_ROWS
        for split, own in names.items()
    }
    source = f"{spec.name} from the Hub, at {commit[:12]}"
    return _with_held_out(spec.name, source, parts, spec, recogniser)


def _is_read(split: str, spec: DataSpec) -> bool:
    """Say whether a split is used: --eval-file takes the place of dev and test."""
    return split == "train" or spec.eval_file is None


def _n_rows_read(spec: DataSpec, *, has_dev: bool) -> int | None:
    """Return how many rows give `train_rows` and the share held out; a stream may have no end."""
    if spec.train_rows is None or has_dev or spec.eval_file:
        return spec.train_rows
    return math.ceil(spec.train_rows / (1 - _share(spec)))


def _share(spec: DataSpec) -> float:
    return DEFAULT_SHARE if spec.eval_share is None else spec.eval_share


def _with_held_out(
    name: str, source: str, parts: dict[str, Rows], spec: DataSpec, recogniser: Recogniser
) -> Dataset:
    """Return the data set with what is evaluated on: a file, a split that is there, or a share.

    Raises DataError for a column that was named and that no row has.
    """
    train, dev, test = (parts[split] for split in ("train", "dev", "test"))
    if spec.eval_file is not None:
        if spec.eval_share is not None:
            raise UserError("--eval-file is evaluated on: leave out --eval-share")
        path = expanded(spec.eval_file)
        files = data_files(str(path))
        if not files:
            raise UserError(f"the evaluation file {path} must be one of {', '.join(READERS)}")
        dev = read_files(files, recogniser, spec.skip_bad_rows)
        test = Rows(dev.examples, {})
    if recogniser.unseen:
        raise DataError(f"{spec.name}: no row has the column {recogniser.unseen!r:.60}")
    if spec.eval_file is not None:
        return dataset_of(name, f"{source}, evaluated on {spec.eval_file}", [train, dev, test])
    if dev.examples and spec.eval_share is None:
        return dataset_of(name, f"{source}, with its dev split", [train, dev, test])
    if dev.examples:
        raise UserError(f"{spec.name} has a dev split of its own: leave out --eval-share")
    examples, held_out, said = _split_off(train, spec)
    train = Rows(examples, train.bad)
    return dataset_of(name, f"{source}; {said}", [train, Rows(held_out, {}), test])


def _split_off(train: Rows, spec: DataSpec) -> tuple[Sequence[Example], Sequence[Example], str]:
    """Hold out the last distinct prompts; (the others' examples, theirs, what was done)."""
    prompts = number_prompts(train.examples)
    n_prompts = int(prompts.max()) + 1
    if n_prompts < 2 and train.examples[0].text:
        return train.examples, (), "one document, so that none is held out"
    if n_prompts < 2:
        raise UserError(
            f"{spec.name} has one distinct prompt, so none can be held out: give --eval-file"
        )
    n_dev = min(n_prompts - 1, max(1, int(n_prompts * _share(spec))))
    is_dev = prompts >= n_prompts - n_dev
    rest, dev = (select(train.examples, np.flatnonzero(ids)) for ids in (~is_dev, is_dev))
    return rest, dev, f"its last {n_dev} of {n_prompts} distinct prompts are the dev split"
