"""The learning rate of a training that is given none: that of its method, higher in few layers.

    rate of the method * sqrt(layers of the model / adapted layers), to two digits

docs/results.md, "The rate of other methods, and of fewer layers", has the measurements behind it.
"""

from swlora.config.adapter import LORA_PLUS_RATIO, AdapterSpec

DEFAULT_RATE = 1e-3
# Of methods whose steps of the same rate change a model by more, or by less
RATES = {
    "lora+": 5e-5,  # of A, where B has LORA_PLUS_RATIO times as much
    "pissa": 3e-4,
    "rslora": 5e-4,
    "adalora": 8e-3,
    "full": 5e-5,
    "supertuning": 4e-3,
}


def method_rate(adapter: AdapterSpec) -> float:
    """Return the rate of a method in all layers; of LoRA+ the one that leaves B's as it is."""
    rate = RATES.get(adapter.method, DEFAULT_RATE)
    return rate * LORA_PLUS_RATIO / (adapter.lora_plus_ratio or LORA_PLUS_RATIO)


def default_rate(adapter: AdapterSpec, *, n_adapted: int, n_layers: int) -> float:
    """Return the rate of a method in `n_adapted` of a model's `n_layers` layers."""
    return float(f"{method_rate(adapter) * (n_layers / n_adapted) ** 0.5:.1e}")
