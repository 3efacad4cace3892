"""Whose scores a run folder holds: what is published may tell no others."""

from pathlib import Path
from typing import Any

from swlora.adapters.saved import WEIGHTS, read_facts
from swlora.deploy.hub_files import Contents
from swlora.deploy.merge_report import MERGE_REPORT, merged_adapter_sha256, read_report
from swlora.errors import UserError
from swlora.files import sha256_of
from swlora.runs import read_run


def check_scored(run: Path, contents: Contents) -> None:
    """Refuse a run whose scores are of another adapter or model than the one to be published.

    An adapter is known by the sha256 of its weights; a merged model by its folder, or by what it
    says of the adapter that was merged into it.
    """
    facts = read_run(run)
    adapter = _scored_adapter(run, facts)
    noted = facts.get("adapter_sha256")
    if contents.kind == "adapter":
        digest = noted or (sha256_of(adapter / WEIGHTS) if adapter else None)
        is_same = digest == sha256_of(contents.folder / WEIGHTS)
    elif adapter is not None:
        is_same = _was_merged(adapter, contents.folder)
    else:
        named = Path(str(facts.get("model")))
        is_same = named.is_dir() and named.resolve() == contents.folder.resolve()
    if not is_same:
        raise UserError(
            f"{run} holds scores of {_named(facts, adapter)}, not of {contents.folder}: run swlora "
            f"eval with --{contents.kind} {contents.folder}, and give --scores that run"
        )


def _scored_adapter(run: Path, facts: dict[str, Any]) -> Path | None:
    """Return the folder of the adapter that was scored, where it is still there."""
    named = facts.get("adapter")
    places = [run / "adapter"] if named is None else [Path(named) / "adapter", Path(named)]
    return next((place for place in places if (place / WEIGHTS).is_file()), None)


def _was_merged(adapter: Path, model: Path) -> bool:
    """Say whether a merged model was made of this adapter.

    Reports of older versions have no hash of it, and tell by what training noted of it.
    """
    if digest := merged_adapter_sha256(model):
        return digest == sha256_of(adapter / WEIGHTS)
    facts, merge = read_facts(adapter), read_report(model / MERGE_REPORT)
    noted, base = merge.get("adapter"), merge.get("base")
    if not noted or not isinstance(noted, dict) or not isinstance(base, dict):
        return False
    sample = facts.get("base_weights_sample_sha256")
    return sample == base.get("weights_sample_sha256") and all(
        facts.get(name) == value for name, value in noted.items()
    )


def _named(facts: dict[str, Any], adapter: Path | None) -> str:
    if facts.get("adapter") or adapter:
        return f"the adapter {facts.get('adapter') or adapter}"
    return f"{facts.get('model', 'another model')} without an adapter"
