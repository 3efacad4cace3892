"""The card that PEFT puts beside an adapter: a template, to be filled in by a person."""

import re

_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}
_ADDED = re.compile(  # what PEFT writes into the template itself
    r"### Framework versions|- PEFT \S+|- \*\*Finetuned from model \[optional\]:\*\* \S+"
    r"|The following `bitsandbytes` quantization config was used during training:"
    r"|- _?(quant_method|load_in_|llm_int8_|bnb_4bit_)\w*: .*"
)


def is_blank_template(card: str) -> bool:
    """Say whether no line and no metadata of a card is a person's."""
    from huggingface_hub import ModelCard, ModelCardData

    try:
        found = ModelCard(card)
    except Exception:  # of YAML's reader, and the library's own: no template of theirs
        return False
    template = ModelCard.from_template(ModelCardData()).text
    lines = {line.strip() for line in found.text.splitlines()}
    lines -= {line.strip() for line in template.splitlines()}
    has_title = "# Model Card for Model ID" in found.text
    is_theirs = set(found.data.to_dict()) <= _KEYS and all(map(_ADDED.fullmatch, lines))
    return has_title and is_theirs
