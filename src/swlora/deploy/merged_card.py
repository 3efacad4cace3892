"""The README.md of a merged model, for people and the Hub."""

from collections.abc import Mapping, Sequence
from typing import Any

from swlora.adapters.card import TITLES, card_text, facts_list
from swlora.deploy.agreement import Agreement
from swlora.result_json import from_json

USAGE = (
    "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS-FOLDER", dtype="auto")\n'
    'tokenizer = AutoTokenizer.from_pretrained("THIS-FOLDER")\n```'
)


def merged_card(
    report: Mapping[str, Any], more: Sequence[str] = (), licence: str | None = None
) -> str:
    """Write the card from the merge report as it stands in the folder.

    `more` are sections that are known where it is published; `licence` is an id of the Hub.
    """
    base, adapter = report["base"], report["adapter"]
    method = str(adapter.get("method", "adapter"))
    facts = {**adapter, **{f"base_{name}": value for name, value in base.items()}}
    facts["base_model"] = base["name"]
    agreement = from_json(Agreement, report["agreement"])
    sections = [
        f"# {base['name']} with {TITLES.get(method, 'an adapter')} merged in",
        "A plain transformers model: an adapter's change was added to the weights by swlora, in "
        f"float32, and rounded once, to {report['dtype']}.",
        "\n".join(facts_list(facts, {})),
        "## The merge",
        f"- Weights that the adapter changed: {report['n_changed_weights']:,}\n"
        f"- Beside base and adapter: {agreement}\n"
        f"- Merged in {report['merge_s']:.1f} s, compared in {report['compare_s']:.1f} s",
        *report["notes"],
        "## Use",
        USAGE,
        *more,
    ]
    meta = {"library_name": "transformers", "tags": [method, "swlora"]}
    return card_text(meta, base["name"] if base["on_hub"] else None, "finetune", licence, sections)
