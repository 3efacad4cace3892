"""What a GPU machine without a network is handed: packages that it lacks, and rows of E2E.

    python -m benchmarks.gpu_prepare FOLDER [--python 3.12]

What is in THERE is taken to be on the machine. pyarrow and pandas, which the peer TRL needs, are
large (60 MB); where they are missing, its arm says so and the others run. The embedded model is too
large to go along, too (98 MB): the benchmark draws weights of its shape.
"""

import argparse
import subprocess
import sys
from pathlib import Path

# Imported by a training, and by the peer TRL; they take the place of what the machine has. Nothing
# is resolved there: what they need in turn is here or in THERE.
PACKAGES = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("gguf", "peft"),
)
PEER_PACKAGES = ("trl==1.16.0", "datasets", "multiprocess", "dill", "xxhash")
THERE = (
    *("torch", "transformers", "accelerate", "numpy", "safetensors", "psutil"),
    *("pytest", "hypothesis"),
    *("huggingface-hub", "packaging", "pyyaml", "tqdm", "filelock", "fsspec", "jinja2", "requests"),
    *("pyarrow", "pandas"),
)
# Of swlora's own needs: no test on a GPU and no arm imports them.
NOT_IMPORTED = (
    *("fastapi", "prometheus-client", "python-multipart", "starlette", "uvicorn"),
    *("matplotlib", "pycocoevalcap", "rich", "sacrebleu", "typer"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
POOL_ROWS = 512 * 12


def main() -> None:
    parser = argparse.ArgumentParser(description="Gather what the GPU benchmark takes along.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version on the machine with the GPU")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for package in (*PACKAGES, *PEER_PACKAGES):
        _download(package, args.folder, args.python)
    try:
        _write_rows(args.folder / "e2e.npz", args.e2e)
    except SystemExit as error:
        print(f"no rows of E2E: {error}; rows of that kind are made instead")
    n_bytes = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {len(list(args.folder.iterdir()))} files, {n_bytes / 1e6:.1f} MB")


def _download(package: str, folder: Path, python: str) -> None:
    """Fetch the version that is installed here, as a wheel for Python `python` on Linux."""
    import importlib.metadata

    pinned = package
    if "==" not in package:
        try:
            pinned = f"{package}=={importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            pinned = package
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    if subprocess.run([*command, pinned], check=False).returncode:
        print(f"{pinned} could not be fetched")


def _write_rows(file: Path, e2e: Path | None) -> None:
    from transformers import AutoTokenizer

    from benchmarks import peers, rows, runner

    dataset = rows.load(rows.find_e2e(e2e))
    tokenizer = AutoTokenizer.from_pretrained(runner.builtin_model())
    peers.encode(rows.pool(dataset.train, POOL_ROWS), dataset.separator, tokenizer).save(file)


if __name__ == "__main__":
    main()
