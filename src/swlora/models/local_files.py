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
