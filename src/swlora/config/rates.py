"""The learning rate of a training that is given none: that of its method, higher in few layers.

    rate of the method * sqrt(layers of the model / adapted layers), to one digit

docs/results.md ("Other methods, fewer layers") has the measurements behind it.
"""

DEFAULT_RATE = 1e-3
# Of methods whose steps of the same rate change a model by more, or by less
RATES = {
    "lora+": 5e-5,  # of A; that of B is a multiple of it
    "pissa": 3e-4,
    "rslora": 5e-4,
    "adalora": 8e-3,
    "full": 5e-5,
    "supertuning": 4e-3,
}


def default_rate(method: str, *, n_adapted: int, n_layers: int) -> float:
    """Return the rate of a method in `n_adapted` of a model's `n_layers` layers."""
    rate = RATES.get(method, DEFAULT_RATE)
    return float(f"{rate * (n_layers / n_adapted) ** 0.5:.0e}")
