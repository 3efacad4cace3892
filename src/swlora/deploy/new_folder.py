"""A folder that is complete or absent."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swlora.disk_space import Need, check_space
from swlora.errors import RunFailedError, UserError
from swlora.files import check_writable, replace_folder


def check_new(output: Path) -> None:
    """Refuse a folder that holds something, or that cannot be made."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is in use: it holds something already; choose another --output")
    check_writable(output.parent, "--output")


@contextmanager
def new_folder(output: Path, n_bytes: int = 0) -> Iterator[Path]:
    """Yield a scratch folder beside `output` that takes its name when the body succeeds.

    Raises UserError where the disk has no room for `n_bytes`, and RunFailedError where it is full
    or not writable; then there is no folder.
    """
    scratch: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        check_space(output, [Need("files", n_bytes)], "choose another --output")
        scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
        yield scratch
        scratch.chmod(0o755)
        replace_folder(scratch, output)
    except OSError as error:
        raise RunFailedError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
