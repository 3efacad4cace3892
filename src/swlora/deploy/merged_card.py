"""The README.md of a merged model, for people and the Hub."""

from typing import TYPE_CHECKING, Any

import yaml

from swlora.adapters.card import TITLES

if TYPE_CHECKING:
    from swlora.deploy.merge import Merged


def merged_card(merged: "Merged") -> str:
    """Write the card from the merge report."""
    base, method = merged.base, str(merged.adapter.get("method", "adapter"))
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.on_hub:
        meta |= {"base_model": base.name, "base_model_relation": "finetune"}
    front = yaml.safe_dump(meta | {"tags": sorted([method, "swlora"])}, sort_keys=True)
    at = f" at {base.revision}" if base.revision else ""
    lines = [
        f"# {base.name} with {TITLES.get(method, 'an adapter')} merged in",
        "A plain transformers model: an adapter's change was added to the weights by swlora, in "
        f"float32, and rounded once, to {merged.dtype}.",
        f"- Base model: {base.name}{at}, read from {base.read_from}\n"
        f"- Sample of its weights: sha256 {base.weights_sample_sha256}\n"
        f"- Weights that the adapter changed: {merged.n_changed_weights:,}\n"
        f"- Beside base and adapter: {merged.agreement}",
        *merged.notes,
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS-FOLDER", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS-FOLDER")\n```',
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(lines) + "\n"
