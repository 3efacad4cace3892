"""The section `adapter`, and which methods have which of its settings."""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from swlora.config.fields import HomePath, Layers, NameList, Spec
from swlora.layer_policy import parse_policy
from swlora.settings import flag_name

MethodName = Literal["lora", "lora+", "dora", "adalora", "pissa", "rslora", "full", "supertuning"]
METHOD_NAMES: tuple[str, ...] = get_args(MethodName)
LORA_PLUS_RATIO = 16.0  # 2^4, which section 4 of LoRA+ (arXiv 2402.12354) recommends
LORA_SETTINGS = frozenset({"rank", "alpha", "dropout"})
METHOD_SETTINGS: dict[str, frozenset[str]] = {  # those of the others: LORA_SETTINGS
    "lora+": LORA_SETTINGS | {"lora_plus_ratio"},
    "full": frozenset(),
    "supertuning": frozenset({"sparsity"}),
}
OPTIONAL_SETTINGS = LORA_SETTINGS.union(*METHOD_SETTINGS.values())  # that not every method has


def settings_of(method: str) -> frozenset[str]:
    """Return those of OPTIONAL_SETTINGS that a method has."""
    return METHOD_SETTINGS.get(method, LORA_SETTINGS)


class AdapterSpec(Spec):
    """The adapter: method, size, and where in the model it sits."""

    method: MethodName = "lora"
    rank: int = Field(default=4, ge=1, le=4096, description="adalora: the mean in the end")
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_plus_ratio: float | None = Field(
        default=None,
        ge=1,
        description=f"lora+: B's learning rate over A's [default: {LORA_PLUS_RATIO:g}]",
    )
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="supertuning: share left frozen [default: 0.99]"
    )
    targets: NameList = Field(
        default_factory=lambda: ["all-linear"],
        min_length=1,
        description="all-linear, or names of projections: q_proj,v_proj",
    )
    layers: Layers = Field(
        default=parse_policy("all"),
        description="all, super (found and proved first), super+removal, auto:0.5 (half of the "
        "time, or all where a trial finds that worse), last:4, first:4, every:4 (evenly spaced), "
        "random:4:SEED, 2,11",
    )

    start: HomePath | None = Field(
        default=None,
        description="adapter or run folder to start from: method, size and place are its own, the "
        "model too where --model is not given [default: a new adapter]",
    )

    @property
    def is_settled(self) -> bool:
        """Whether method and place are known: not before an adapter to start from was read."""
        return self.start is None or {"method", "layers"} <= self.model_fields_set

    @model_validator(mode="after")
    def _takes_its_settings(self) -> Self:
        if not self.is_settled:
            return self
        given = {n for n, f in AdapterSpec.model_fields.items() if getattr(self, n) != f.default}
        ignored = sorted(given & (OPTIONAL_SETTINGS - settings_of(self.method)))
        if ignored:
            flags = ", no ".join(flag_name(f"adapter.{name}") for name in ignored)
            raise ValueError(f"--method {self.method} has no {flags}; leave that out")
        return self
