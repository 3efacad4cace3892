"""The files of a model on this machine: where they lie, or fetched from the Hub."""

from pathlib import Path

from swlora.errors import UserError
from swlora.hub import hub_reachable
from swlora.models.load import LoadedModel


def local_files(loaded: LoadedModel) -> Path:
    """Return the folder or .gguf file of a model; of one from the Hub, fetched where needed."""
    path = Path(loaded.name)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*config.json"]
    try:
        folder = snapshot_download(
            loaded.name,
            revision=loaded.revision,
            allow_patterns=patterns,
            local_files_only=not hub_reachable(),
        )
    except Exception as error:  # of the Hub's client, of the network
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"the weights of {loaded.name} cannot be had: {detail}") from error
    return Path(folder)


def local_file(loaded: LoadedModel, name: str) -> Path | None:
    """Return a small file beside a model's weights; of one from the Hub, fetched where needed.

    None where there is none, or where it is not to be had: for what a model may lack.
    """
    folder = Path(loaded.name)
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download

    offline = not hub_reachable()
    try:
        path = hf_hub_download(
            loaded.name, name, revision=loaded.revision, local_files_only=offline
        )
    except Exception:  # it is not there, or the network is not
        return None
    return Path(path)
