"""Data sets of the Hugging Face Hub: which commit is read, and the rows of a split, as they come.

One short request asks for the commit, and shows whether the Hub can be reached at all; the rows are
then streamed by `datasets`, so that they need not fit the disk.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from swlora.data.column_records import record_of
from swlora.data.files import split_of
from swlora.data.records import MAX_RECORD_BYTES
from swlora.errors import UserError, brief
from swlora.hub import offline_variable
from swlora.library_noise import quiet_libraries

HUB_TIMEOUT_S = 5.0


class HubUnreachableError(UserError):
    """No connection to the Hub; the message says why."""

    code = "hub_unreachable"


def hub_commit(name: str, revision: str | None) -> str:
    """Resolve a revision of a data set to a commit, by one short request.

    Raises HubUnreachableError without an answer, UserError where the Hub refuses.
    """
    if variable := offline_variable():
        raise HubUnreachableError(f"the Hub cannot be reached: {variable} is set")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    outcome: list[str | Exception] = []

    def ask() -> None:
        try:
            info = HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
            outcome.append(str(info.sha))
        except Exception as error:  # the transport's errors differ from version to version
            outcome.append(error)

    # A thread, because name resolution honours no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    answer = outcome[0] if outcome else TimeoutError(f"no answer in {HUB_TIMEOUT_S:g} s")
    if isinstance(answer, HfHubHTTPError) and answer.response.status_code < 500:
        raise UserError(f"the Hub refuses {name}: {brief(answer)}") from answer
    if isinstance(answer, Exception):
        raise HubUnreachableError(f"the Hub cannot be reached: {brief(answer)}") from answer
    return answer


class HubData:
    """A data set of the Hub at one commit; UserError where it cannot be read."""

    def __init__(self, name: str, config: str | None, commit: str) -> None:
        import datasets

        self._name = name
        try:
            with quiet_libraries():
                self._splits: Mapping[str, Any] = datasets.load_dataset(
                    name, config, revision=commit, streaming=True
                )
        except Exception as error:  # its loaders raise errors of many libraries
            raise self._refusal(error) from error

    def split_names(self, split: str) -> list[str]:
        """Return those of the Hub's splits that are "dev" or "test", by the rule for files."""
        return [name for name in self._splits if split_of(name) == split]

    def records(self, split: str) -> Iterator[dict[str, Any] | str]:
        """Yield the rows of a split by its name on the Hub, or why one is none.

        Raises UserError, with the names that there are, for no such split.
        """
        if split not in self._splits:
            there = ", ".join(self._splits)
            raise UserError(f"{self._name} has no split {split!r}, only {there}: --train-split")
        try:
            with quiet_libraries():
                rows = self._splits[split]
                # Pictures and sound that no form has are neither decoded nor asked for a library.
                for row in rows.decode(False) if rows.features else rows:
                    yield record_of(row, MAX_RECORD_BYTES)
        except ConnectionError as error:
            raise HubUnreachableError(f"the Hub cannot be reached: {brief(error)}") from error
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> UserError:
        said = brief(error)
        if isinstance(error, ConnectionError):
            return HubUnreachableError(f"the Hub cannot be reached: {said}")
        if "script" in said.lower():
            return UserError(
                f"cannot load {self._name}: it is a script, which is not run; try "
                "--dataset-revision refs/convert/parquet"
            )
        if "config" in said.lower():
            return UserError(f"cannot load {self._name}: {said}: choose one with --config-name")
        return UserError(f"cannot load {self._name}: {said}")
