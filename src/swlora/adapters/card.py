"""What a saved adapter says of itself: facts for swlora, and a README.md for people and the Hub.

Nothing in them is a path of the machine that trained: a data file has its name and the hash of its
rows, a model what `swlora.models.identity` calls it.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import yaml

from swlora.config import AdapterSpec, RunSpec, settings_of
from swlora.data.dataset import E2E_NAME, Dataset
from swlora.data.examples import Example
from swlora.layer_policy import Kind, parse_policy
from swlora.models.identity import BaseModel
from swlora.plural import counted
from swlora.versions import package_versions

Facts = dict[str, Any]

TITLES = {
    "lora": "LoRA",
    "lora+": "LoRA+",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "pissa": "PiSSA",
    "rslora": "rsLoRA",
    "full": "Full-rank",
    "supertuning": "Super-Tuning",
}
POLICIES: dict[Kind, str] = {
    "all": "all that the model has",
    "super": "those in which `swlora identify` verified a super weight",
    "super+removal": "those with a verified super weight, and those that take its activation away",
    "auto": "as a short trial within the budget decided, or all that the model has",
    "last": "asked for as the last ones",
    "first": "asked for as the first ones",
    "every": "asked for as evenly spaced",
    "random": "drawn at random, as a control",
    "list": "a list that was asked for",
}
START = "start_adapter_sha256"  # of what the training started from, where not from nothing
SAMPLED_ROWS = 1000
UNKNOWN_LICENCE = "unknown: fill in"
DATA_LICENCES = {E2E_NAME: "CC BY-SA 4.0"}
_SIGNATURE = re.compile(r"\n<!-- written by swlora: sha256 ([0-9a-f]{64}) -->\n\Z")


def training_facts(spec: RunSpec, base: BaseModel, dataset: Dataset, layers: list[int]) -> Facts:
    """Return what is known of an adapter before its training; all values are JSON's.

    `is_chat` says that its rows are chats (most of the first thousand): such an adapter wants its
    prompts written by the chat template.
    """
    taken = settings_of(spec.adapter.method)
    settings = {n: getattr(spec.adapter, n) for n in AdapterSpec.model_fields if n in taken}
    return {
        "separator": dataset.separator,
        "is_chat": _is_chat(dataset.train),
        "layers": layers,
        "layer_policy": str(spec.adapter.layers),
        "method": spec.adapter.method,
        "settings": {n: value for n, value in settings.items() if value is not None},
        "targets": list(spec.adapter.targets),
        "base_model": base.name,
        "base_revision": base.revision,
        "base_on_hub": base.on_hub,
        "base_read_from": base.read_from,
        "base_flag": base.flag,
        "base_weights_sample_sha256": base.weights_sample_sha256,
        "data": {
            "name": dataset.name,
            "rows": len(dataset.train),
            "sha256": dataset.sha256,
        },
        "training": spec.train.model_dump(
            mode="json",
            include={"epochs", "batch_size", "learning_rate", "schedule", "max_steps"},
            exclude_none=True,
        ),
        "seed": spec.seed,
        "packages": package_versions(),
    }


def _is_chat(examples: Sequence[Example]) -> bool:
    shown = list(islice(examples, SAMPLED_ROWS))
    return 2 * sum(bool(example.messages) for example in shown) > len(shown)


def last_losses(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the newest losses of a training's metrics, in nats a trained token."""
    names = {"loss": "training, last step", "eval_nll": "held-out rows"}
    newest = {k: line[k] for line in metrics for k in names if k in line}
    return {names[k]: loss for k, loss in newest.items()}


def model_card(
    facts: Facts, config: dict[str, Any], more: Sequence[str] = (), licence: str | None = None
) -> str:
    """Write README.md from the facts beside an adapter and PEFT's own configuration of it.

    `more` are sections that are known where it is published; `licence` is an id of the Hub.
    """
    method = str(facts.get("method", config.get("peft_type", "adapter"))).lower()
    title, base = TITLES.get(method, method), facts.get("base_model") or "another model"
    sections = [
        f"# {title} adapter for {base}",
        "A standard PEFT adapter, trained with swlora.",
        "\n".join(facts_list(facts, config)),
        "## Use",
        *_usage(facts),
        *more,
    ]
    if packages := facts.get("packages"):
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        sections += ["## Versions", versions]
    of_hub = facts["base_model"] if facts.get("base_on_hub") else None
    meta = {"library_name": "peft", "tags": [method, "swlora", "transformers"]}
    return card_text(meta, of_hub, "adapter", licence, sections)


def card_text(
    meta: dict[str, Any],
    base: str | None,
    relation: str,
    licence: str | None,
    sections: Sequence[str],
) -> str:
    """Put a card together: the metadata that the Hub reads, sections, and swlora's signature.

    `base` is a Hub id, or None. Without `licence` none is named: it is the trainer's to choose.
    """
    meta = {"pipeline_tag": "text-generation", **meta}
    if base:
        meta |= {"base_model": base, "base_model_relation": relation}
        meta["tags"] = [*meta["tags"], f"base_model:{relation}:{base}"]
    if licence:
        meta["license"] = licence
    meta["tags"] = sorted(meta["tags"])
    front = yaml.safe_dump(meta, sort_keys=True, allow_unicode=True)
    text = f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"
    return f"{text}\n<!-- written by swlora: sha256 {_sha256(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Say whether swlora wrote a card and nobody has changed it since."""
    signature = _SIGNATURE.search(card)
    return signature is not None and _sha256(card[: signature.start()]) == signature[1]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def facts_list(facts: Facts, config: dict[str, Any]) -> Iterator[str]:
    """Yield what an adapter is and was trained on, as lines of a list."""
    if facts.get("base_model"):
        at = f" at {facts['base_revision']}" if facts.get("base_revision") else ""
        read = f", read from {facts['base_read_from']}" if "base_read_from" in facts else ""
        yield f"- Base model: {facts['base_model']}{at}{read}"
        if sample := facts.get("base_weights_sample_sha256"):
            yield f"- Sample of its weights: sha256 {sample}"
    if settings := facts.get("settings"):
        shown = ", ".join(f"{n.replace('_', ' ')} {value:g}" for n, value in settings.items())
        saved = config.get("r")
        grown = saved and "rank" in settings and saved != settings["rank"]
        yield f"- Settings: {shown}" + (f" (saved as LoRA of rank {saved})" if grown else "")
    if facts.get("layers"):
        asked = ""
        if "layer_policy" in facts and START not in facts:
            policy = parse_policy(facts["layer_policy"])
            asked = f" (`--layers {policy}`: {POLICIES[policy.kind]})"
        yield f"- Layers: {', '.join(map(str, facts['layers']))}{asked}"
        yield f"- Modules: {', '.join(facts.get('targets', []))}"
    if START in facts:
        yield f"- Started from: an adapter whose weights have the sha256 {facts[START]}"
    if data := facts.get("data"):
        kind = "chats" if facts.get("is_chat") else "prompts with completions"
        rows = counted(data["rows"], "row")
        yield f"- Data: {data['name']}, {rows} ({kind}), sha256 {data['sha256']}"
        yield f"- Licence of the data: {DATA_LICENCES.get(data['name'], UNKNOWN_LICENCE)}"
    if training := facts.get("training"):
        shown = ", ".join(f"{n.replace('_', ' ')} {value}" for n, value in training.items())
        yield f"- Training: {shown}, seed {facts.get('seed', 0)}"
    for name, loss in facts.get("losses_nats_per_token", {}).items():
        yield f"- Loss, {name}: {loss:.4f} nats a trained token"


def _usage(facts: Facts) -> list[str]:
    base = facts.get("base_model") or "BASE-MODEL"
    revision = f", revision={facts['base_revision']!r}" if facts.get("base_revision") else ""
    imported, read = "AutoModelForCausalLM, AutoTokenizer", f"{base!r}{revision}"
    if base.endswith(".gguf"):
        imported += ", GgufConfig"
        read = f'"ITS-FOLDER", gguf_file={base!r}, '
        read += "quantization_config=GgufConfig(dequantize=True)"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {imported}",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({read})",
        'model = PeftModel.from_pretrained(base, "THIS-FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS-FOLDER")',
        *_prompt_lines(facts),
        "new = model.generate(**ids, max_new_tokens=96)[0, ids.input_ids.shape[1] :]",
        "print(tokenizer.decode(new, skip_special_tokens=True))",
    ]
    sections = ["```python\n" + "\n".join(lines) + "\n```"]
    if facts.get("base_model") and not facts.get("base_on_hub"):
        sections.insert(0, f"{base} is not on the Hub by that name: put your path to it there.")
    flags = f"--model {facts.get('base_flag') or base} --adapter THIS-FOLDER"
    if facts.get("base_revision"):
        flags += f" --revision {facts['base_revision']}"
    verb = "chat" if facts.get("is_chat") else "generate"
    ask = "" if facts.get("is_chat") else ' --prompt "YOUR PROMPT"'
    return [*sections, f"```\nswlora {verb} {flags}{ask}\n```"]


def _prompt_lines(facts: Facts) -> list[str]:
    """Return Python that shows the model its prompt as it was in training."""
    if facts.get("is_chat"):
        return [
            'turns = [{"role": "user", "content": "YOUR MESSAGE"}]',
            "text = tokenizer.apply_chat_template(turns, tokenize=False, "
            "add_generation_prompt=True)",
            'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        ]
    behind = f" + {facts['separator']!r}" if facts.get("separator") else ""
    return [f'ids = tokenizer("YOUR PROMPT"{behind}, return_tensors="pt")']
