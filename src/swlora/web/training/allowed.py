"""Whether a server may train at all: checked before anything is loaded."""

from swlora.config import ServeSpec
from swlora.errors import UserError
from swlora.files import check_writable
from swlora.paths import expanded


def check_allowed(spec: ServeSpec, *, has_key: bool) -> None:
    """Raise UserError for --allow-training that others could use, or without its folders.

    Without a key, only this machine may ask, and by no other name: behind a proxy that has one,
    or for a page of another origin, nobody would be asked who they are.
    """
    if not spec.allow_training or spec.data_folder is None:
        return
    if not has_key and (spec.allowed_hosts or spec.cors_origins):
        raise UserError(
            "--allow-training with --allowed-hosts or --cors-origins needs a key: set "
            "SWLORA_API_KEY (or --api-key) to a secret that every client must send"
        )
    data, runs = expanded(spec.data_folder), expanded(spec.runs)
    if not data.is_dir():
        raise UserError(
            f"there is no folder {spec.data_folder}; --data-folder names the folder of your data"
        )
    if data.resolve() == runs.resolve():
        raise UserError("--data-folder and --runs are one folder; give the data one of their own")
    check_writable(runs, "--runs")
