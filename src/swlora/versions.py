"""Which versions of which packages a result was made with."""

import importlib.metadata

PACKAGES = ("swlora", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result."""
    return {name: installed_version(name) or "not installed" for name in PACKAGES}


def installed_version(name: str) -> str | None:
    """Return the installed version of a package; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
