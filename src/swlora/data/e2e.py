"""E2E NLG: three CSV files in a folder, or the Hub's copy of them, checked row by row.

prompt = meaning representation and a line break,  completion = what a person wrote of it
"""

from collections.abc import Sequence
from pathlib import Path

from swlora.config import DEFAULT_DATASET
from swlora.data.dataset import E2E_NAME, Dataset
from swlora.data.examples import make_example
from swlora.data.hub_data import HubUnreachableError, hub_commit
from swlora.data.rows import E2E_COLUMNS, Rows, collect_rows, dataset_of, read_rows
from swlora.errors import DataError, UserError, brief
from swlora.library_noise import quiet_libraries
from swlora.plural import counted

E2E_FOLDER_VARIABLE = "SWLORA_E2E"
E2E_FILES = ("trainset.csv", "devset.csv", "testset_w_refs.csv")
# The main branch of the Hub repository is a script, which datasets >= 4 refuses to run.
HUB_REVISION = "refs/convert/parquet"
HUB_COLUMNS = ("meaning_representation", "human_reference")
HUB_ROWS = {"train": 42061, "validation": 4672, "test": 4693}


def load_e2e_folder(folder: Path, skip_bad_rows: bool) -> Dataset:
    """Read the three files of a folder; UserError where one of them is missing."""
    missing = [name for name in E2E_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"the folder {folder} has no {', '.join(missing)}, so it is not E2E data")
    parts = [read_rows([folder / name], E2E_COLUMNS, skip_bad_rows) for name in E2E_FILES]
    return e2e_dataset(f"E2E NLG from the folder {folder}", parts)


def load_e2e_hub(skip_bad_rows: bool) -> Dataset:
    """Read the Hub's copy; HubUnreachableError without a connection, DataError for other data."""
    commit = hub_commit(DEFAULT_DATASET, HUB_REVISION)
    import datasets

    advice = f"set {E2E_FOLDER_VARIABLE} to a folder with the E2E files, or use sample"
    try:
        with quiet_libraries():
            tables = datasets.load_dataset(DEFAULT_DATASET, revision=commit)
    except ConnectionError as error:
        raise HubUnreachableError(f"the Hub cannot be reached: {brief(error)}") from error
    except Exception as error:  # its loaders raise errors of many libraries
        raise UserError(f"cannot load {DEFAULT_DATASET}: {brief(error)}; {advice}") from error
    parts = []
    for split, n_rows in HUB_ROWS.items():
        table = tables.get(split)
        wanted = f"{counted(n_rows, 'row')} of {', '.join(HUB_COLUMNS)}"
        found = (
            "nothing"
            if table is None
            else f"{counted(len(table), 'row')} of {', '.join(table.column_names)}"
        )
        if found != wanted:
            raise DataError(f"{DEFAULT_DATASET} {split} is {found}, not {wanted}: {advice}")
        pairs = zip(*(list(table[column]) for column in HUB_COLUMNS), strict=True)
        where = f"{DEFAULT_DATASET} {split}, row"
        rows = ((where, i, make_example(*pair)) for i, pair in enumerate(pairs, start=1))
        parts.append(collect_rows(rows, f"{where} 1", skip_bad_rows))
    source = f"E2E NLG from the Hub ({DEFAULT_DATASET}, {HUB_REVISION} at {commit[:12]})"
    return e2e_dataset(source, parts)


def e2e_dataset(source: str, parts: Sequence[Rows]) -> Dataset:
    """Return train, dev and test as a data set whose prompts end in a line break."""
    return dataset_of(E2E_NAME, source, parts, separator="\n")
