"""The card of what is published: what it is and comes from, how it was made, what it scored."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.adapters.card import card_text, is_untouched, model_card
from swlora.adapters.saved import CONFIG, read_facts
from swlora.deploy.hub_access import REPO
from swlora.deploy.hub_files import CARD, Contents
from swlora.deploy.hub_places import BASE, is_place, places_in, published_text
from swlora.deploy.merge_report import MERGE_REPORT, gguf_report, read_report
from swlora.deploy.merged_card import USAGE, merged_card
from swlora.deploy.peft_card import is_blank_template
from swlora.deploy.run_notes import score_sections, training_sections
from swlora.deploy.scored import check_scored
from swlora.errors import UserError, brief
from swlora.files import read_text
from swlora.runs import read_result


@dataclass(frozen=True)
class CardSources:
    """What a person names for the card: a run folder with scores, and a licence id of the Hub."""

    scores: Path | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Card:
    """README.md as it is published; `is_ours` says whether it is swlora's to write.

    `changes` say what is other in it than in the folder's.
    """

    text: str
    is_ours: bool
    changes: list[str]


def card_for(contents: Contents, asked: Path | None, sources: CardSources) -> Card:
    """Return the card of a folder's contents.

    A card that a person wrote or changed is kept as it is, and checked; PEFT's template that nobody
    filled in is replaced. `asked` may be the run folder that an adapter lies in: its command,
    timings and scores are told.
    """
    folder = contents.folder
    path = folder / CARD
    kept = read_text(path) if path.is_file() else None
    is_template = kept is not None and is_blank_template(kept)
    if kept is not None and not is_template and not is_untouched(kept):
        if sources.licence or sources.scores:
            raise UserError(
                f"{path} was changed by hand and is published as it is: write licence and scores "
                "there yourself, or remove it to have a new one"
            )
        _check(kept, path)
        text, changes = published_text(path)
        return Card(text or kept, False, changes)
    run = _run_folder(asked) if asked else None
    scored = run if run and folder.resolve() == (run / "adapter").resolve() else None  # not best/
    more = [*(training_sections(run) if run else ()), *_scores(scored, contents, sources)]
    more += _exports(contents)
    if contents.kind == "adapter":
        config = json.loads(contents.replaced.get(CONFIG) or (folder / CONFIG).read_text("utf-8"))
        text = model_card(_facts(folder, config), config, more, sources.licence)
    else:
        text = _model_card(folder, more, sources.licence)
    _check(text, path)
    for place in places_in(text):
        raise UserError(f"the card would name a folder of this machine, {place}; write it yourself")
    template = f"{CARD} was a template that nobody filled in: swlora's card takes its place"
    return Card(text, True, [template] if is_template else [])


def _facts(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training noted; of an adapter from elsewhere, what its configuration says."""
    facts, base = read_facts(folder), config.get(BASE)
    if "base_model" in facts or not base:
        return facts
    found = {"base_model": base, "base_revision": config.get("revision")}
    return facts | found | {"base_on_hub": REPO.fullmatch(str(base)) is not None}


def _run_folder(path: Path) -> Path | None:
    """Return the run folder that an adapter's path is, or lies in; None where it is none."""
    return next((f for f in (path, path.parent) if (f / "run.json").is_file()), None)


def _scores(run: Path | None, contents: Contents, sources: CardSources) -> Iterator[str]:
    if sources.scores is not None:
        if "eval" not in read_result(sources.scores):
            raise UserError(f"{sources.scores} holds no scores: give --scores a run of swlora eval")
        check_scored(sources.scores, contents)
        yield from score_sections(sources.scores)
    elif run is not None:
        yield from score_sections(run)


def _check(text: str, path: Path) -> None:
    """Refuse metadata that the Hub's own reader does not take."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    except Exception as error:  # of YAML's reader, and the library's own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the metadata at the top of {path} cannot be read: {reason}") from error


def _model_card(folder: Path, more: list[str], licence: str | None) -> str:
    """Write the card of a plain model: from the report of its merge, where it has one."""
    path = folder / MERGE_REPORT
    if not path.is_file():
        sections = [f"# {folder.resolve().name}", "A plain transformers model.", USAGE, *more]
        meta = {"library_name": "transformers", "tags": ["swlora"]}
        return card_text(meta, None, "finetune", licence, sections)
    try:
        return merged_card(read_report(path), more, licence)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no merge report: {brief(error)}") from error


def _exports(contents: Contents) -> Iterator[str]:
    """Yield a section on each GGUF file that has a report beside it."""
    for path in sorted(contents.folder.glob("*.gguf")):
        report = gguf_report(path)
        if report.is_file():
            yield f"## {path.name}"
            yield _as_list(read_report(report))


def _as_list(report: Mapping[str, Any], depth: int = 0) -> str:
    """Write a report as a list of its words and numbers; paths by their names alone."""
    lines = []
    for name, value in report.items():
        key = "  " * depth + f"- {name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += [key, _as_list(value, depth + 1)] if value else []
        elif isinstance(value, list):
            if value and all(isinstance(one, str | int | float) for one in value):
                lines.append(f"{key}: {', '.join(map(_shown, value))}")
        elif value is not None:
            lines.append(f"{key}: {_shown(value)}")
    return "\n".join(filter(None, lines))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    for place in [text] if is_place(text) else places_in(text):
        text = text.replace(place, Path(place).name)
    return text[:300]
