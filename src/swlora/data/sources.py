"""Where rows come from: E2E NLG (Hub or CSV folder), JSONL and CSV files, chats, the sample.

Every source ends as one `Dataset` of `Example`s with the text untouched; how a prompt becomes
tokens is `encode`'s business. What was loaded, and why, is said in `Dataset.source`.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swlora.config import DEFAULT_DATASET, SAMPLE_DATASET, DataSpec
from swlora.data.examples import Example, keep, make_example, select
from swlora.data.rows import E2E_COLUMNS, READERS, collect_rows, read_rows
from swlora.data.sample import make_sample
from swlora.errors import DataError, UserError
from swlora.hub import offline_variable
from swlora.library_noise import quiet_libraries
from swlora.settings import flag_name

E2E_FOLDER_VARIABLE = "SWLORA_E2E"
E2E_NAME = "E2E NLG"
E2E_FILES = ("trainset.csv", "devset.csv", "testset_w_refs.csv")
# The main branch of the Hub repository is a script, which datasets >= 4 refuses to run.
HUB_REVISION = "refs/convert/parquet"
HUB_COLUMNS = ("meaning_representation", "human_reference")
HUB_ROWS = {"train": 42061, "validation": 4672, "test": 4693}
HUB_TIMEOUT_S = 5.0
SAMPLE_SOURCE = "the built-in sample (made from a grammar; not E2E)"


@dataclass(frozen=True)
class Dataset:
    """Rows by split. `separator` goes between prompt and completion; `sha256` is of all rows."""

    name: str
    source: str
    separator: str
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    n_skipped_rows: int
    sha256: str

    @property
    def is_e2e(self) -> bool:
        """Say whether the rows are E2E NLG, or the sample that stands in for it."""
        return self.name in (E2E_NAME, SAMPLE_DATASET)

    @property
    def is_sample(self) -> bool:
        """Say whether the rows are those that swlora makes itself."""
        return self.name == SAMPLE_DATASET

    def split(self, name: str) -> Sequence[Example]:
        """Return the rows of "train", "dev" or "test"; UserError where there are none."""
        splits = {"train": self.train, "dev": self.dev, "test": self.test}
        if name not in splits:
            raise UserError(f"no split is called {name!r}; use train, dev or test")
        if not splits[name]:
            other = next((s for s in ("dev", "test", "train") if splits[s]), "train")
            raise UserError(f"the data set has no {name} split; use --split {other}")
        return splits[name]


def group_references(examples: Iterable[Example]) -> list[tuple[Example, list[str]]]:
    """List the distinct prompts in file order: the first example of each, all its completions."""
    groups: dict[str, tuple[Example, list[str]]] = {}
    for example in examples:
        group = groups.setdefault(example.prompt_key, (example, []))
        group[1].append(example.completion)
    return list(groups.values())


def number_prompts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the number (n,) of each row's distinct prompt, in the order of `group_references`.

    Prompts are told apart by 8 bytes of a hash: among 10^8 of them two would be taken for one with
    a chance of 1 in 4,000, and be held out together.
    """
    keys = (e.prompt_key.encode() for e in examples)
    digests = (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) for key in keys)
    array = np.fromiter(digests, dtype=np.uint64, count=len(examples))
    _, first, inverse = np.unique(array, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def load_dataset(spec: DataSpec) -> Dataset:
    """Load what `spec.name` names and keep the rows that its limits allow.

    The default Hub id is read from the folder in SWLORA_E2E, if set, else from the Hub. Where no
    data were named and the Hub cannot be reached, the sample takes their place, and `source` says
    so. Raises UserError for a name that is no source, HubUnreachableError for data that were named
    and cannot be had, DataError for rows that cannot be used.
    """
    path = Path(spec.name).expanduser()
    known = spec.name in (SAMPLE_DATASET, DEFAULT_DATASET)
    if not known and path.suffix.lower() in READERS and not path.is_dir():
        return _limited(_load_file(path, spec), spec)
    for option in ("eval_file", "prompt_column", "completion_column"):
        if getattr(spec, option) != DataSpec.model_fields[option].default:
            flag = flag_name(f"data.{option}")
            raise UserError(f"{flag} is for JSONL and CSV files, not for {spec.name}")
    if spec.name == SAMPLE_DATASET:
        return _limited(_load_sample(SAMPLE_SOURCE), spec)
    if spec.name == DEFAULT_DATASET:
        return _limited(_load_default(spec), spec)
    if path.is_dir():
        return _limited(_load_folder(path, spec.skip_bad_rows), spec)
    raise UserError(
        f"no data set {spec.name!r}: give {DEFAULT_DATASET}, {SAMPLE_DATASET}, a folder with "
        f"{', '.join(E2E_FILES)}, or a .jsonl or .csv file"
    )


def _limited(dataset: Dataset, spec: DataSpec) -> Dataset:
    train = _first_prompts(dataset.train, spec.train_prompts)[: spec.train_rows]
    dev = _first_prompts(dataset.dev, spec.eval_prompts)
    test = _first_prompts(dataset.test, spec.eval_prompts)
    digest = hashlib.sha256(json.dumps(dataset.separator).encode())
    for split, examples in (("train", train), ("dev", dev), ("test", test)):
        for e in examples:
            digest.update(json.dumps([split, *e.fields]).encode() + b"\n")
    return replace(dataset, train=train, dev=dev, test=test, sha256=digest.hexdigest())


def _first_prompts(examples: Sequence[Example], n: int | None) -> Sequence[Example]:
    if n is None:
        return examples
    prompts = number_prompts(examples)
    return select(examples, np.flatnonzero(prompts < n))


# Sources


def _load_default(spec: DataSpec) -> Dataset:
    if folder := os.environ.get(E2E_FOLDER_VARIABLE):
        try:
            return _load_folder(Path(folder).expanduser(), spec.skip_bad_rows)
        except UserError as error:
            raise type(error)(f"{E2E_FOLDER_VARIABLE}: {error}") from error
    try:
        return _load_hub(spec.skip_bad_rows)
    except HubUnreachableError as error:
        hint = f"set {E2E_FOLDER_VARIABLE} to a folder with the E2E files to use those"
        if "name" in spec.model_fields_set:
            raise HubUnreachableError(
                f"{DEFAULT_DATASET} cannot be loaded, since {error}; {hint}, or give --dataset "
                f"{SAMPLE_DATASET}"
            ) from error
        return _load_sample(f"{SAMPLE_SOURCE}, since {error}; {hint}")


def _load_folder(folder: Path, skip_bad_rows: bool) -> Dataset:
    missing = [name for name in E2E_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"the folder {folder} has no {', '.join(missing)}, so it is not E2E data")
    parts = [read_rows(folder / name, E2E_COLUMNS, skip_bad_rows) for name in E2E_FILES]
    return _assembled(E2E_NAME, f"E2E NLG from the folder {folder}", "\n", parts)


def _load_sample(source: str) -> Dataset:
    parts = [(keep(Example(mr, ref) for mr, ref in pairs), 0) for pairs in make_sample()]
    return _assembled(SAMPLE_DATASET, source, "\n", parts)


def _load_file(path: Path, spec: DataSpec) -> Dataset:
    columns = (spec.prompt_column, spec.completion_column)
    train, n_skipped = read_rows(path, columns, spec.skip_bad_rows)
    if spec.eval_file is not None:
        eval_path = spec.eval_file.expanduser()
        if eval_path.suffix.lower() not in READERS:
            raise UserError(f"the evaluation file {eval_path} must be a .jsonl or .csv file")
        held_out = read_rows(eval_path, columns, spec.skip_bad_rows)
        source = f"rows of {path}, evaluated on {eval_path}"
        parts = [(train, n_skipped), held_out, (held_out[0], 0)]
        return _assembled(path.name, source, "", parts)
    prompts = number_prompts(train)
    n_prompts = int(prompts.max()) + 1
    if n_prompts < 2:
        raise UserError(
            f"{path} has one distinct prompt, so none can be held out: give --eval-file"
        )
    n_dev = max(1, n_prompts // 20)
    is_dev = prompts >= n_prompts - n_dev
    dev, train = (select(train, np.flatnonzero(ids)) for ids in (is_dev, ~is_dev))
    source = f"rows of {path}; its last {n_dev} of {n_prompts} distinct prompts are the dev split"
    return _assembled(path.name, source, "", [(train, n_skipped), (dev, 0), ((), 0)])


def _assembled(
    name: str, source: str, separator: str, parts: Sequence[tuple[Sequence[Example], int]]
) -> Dataset:
    train, dev, test = (examples for examples, _ in parts)
    n_skipped = sum(n for _, n in parts)
    return Dataset(name, source, separator, train, dev, test, n_skipped, sha256="")


# The Hub


class HubUnreachableError(UserError):
    """No connection to the Hub; the message says why."""

    code = "hub_unreachable"


def _load_hub(skip_bad_rows: bool) -> Dataset:
    commit = _hub_commit()
    import datasets

    advice = f"set {E2E_FOLDER_VARIABLE} to a folder with the E2E files, or use {SAMPLE_DATASET}"
    try:
        with quiet_libraries():
            tables = datasets.load_dataset(DEFAULT_DATASET, revision=commit)
    except ConnectionError as error:
        raise HubUnreachableError(f"the Hub cannot be reached: {_brief(error)}") from error
    except Exception as error:  # its loaders raise errors of many libraries
        raise UserError(f"cannot load {DEFAULT_DATASET}: {_brief(error)}; {advice}") from error
    parts = []
    for split, n_rows in HUB_ROWS.items():
        table = tables.get(split)
        wanted = f"{n_rows} rows of {', '.join(HUB_COLUMNS)}"
        found = (
            "nothing" if table is None else f"{len(table)} rows of {', '.join(table.column_names)}"
        )
        if found != wanted:
            raise DataError(f"{DEFAULT_DATASET} {split} is {found}, not {wanted}: {advice}")
        pairs = zip(*(list(table[column]) for column in HUB_COLUMNS), strict=True)
        rows = ((i, make_example(*pair)) for i, pair in enumerate(pairs, start=1))
        parts.append(collect_rows(rows, f"{DEFAULT_DATASET} {split}, row", skip_bad_rows))
    source = f"E2E NLG from the Hub ({DEFAULT_DATASET}, {HUB_REVISION} at {commit[:12]})"
    return _assembled(E2E_NAME, source, "\n", parts)


def _hub_commit() -> str:
    """Resolve the Parquet branch to a commit, by one short request that shows if we are online."""
    if variable := offline_variable():
        raise HubUnreachableError(f"the Hub cannot be reached: {variable} is set")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    outcome: list[str | Exception] = []

    def ask() -> None:
        try:
            api = HfApi()
            info = api.dataset_info(DEFAULT_DATASET, revision=HUB_REVISION, timeout=HUB_TIMEOUT_S)
            outcome.append(str(info.sha))
        except Exception as error:  # the transport's errors differ from version to version
            outcome.append(error)

    # A thread, because name resolution honours no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    answer = outcome[0] if outcome else TimeoutError(f"no answer in {HUB_TIMEOUT_S:g} s")
    if isinstance(answer, HfHubHTTPError) and answer.response.status_code < 500:
        raise UserError(f"the Hub refuses {DEFAULT_DATASET}: {_brief(answer)}") from answer
    if isinstance(answer, Exception):
        raise HubUnreachableError(f"the Hub cannot be reached: {_brief(answer)}") from answer
    return answer


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
