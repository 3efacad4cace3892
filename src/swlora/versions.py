"""Which versions of which packages a result was made with."""

import importlib.metadata

PACKAGES = ("swlora", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
