"""Where an adapter goes, said in the way that PEFT's configurations understand.

Configurations that know layers get module names and layer numbers; the others get the full name of
every projection, which all of PEFT's methods take.
"""

from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from swlora.models.anatomy import Anatomy


@dataclass(frozen=True)
class Site:
    """Projections (named relative to a block) of some layers, adapted for `n_steps` steps.

    `n_steps` is None where nobody said how long the training is.
    """

    anatomy: Anatomy
    targets: list[str]
    layers: list[int]
    n_steps: int | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The projections by their full names, first layer first.

        Raises UserError for a layer that does not exist.
        """
        family = self.anatomy.family
        return {
            f"{family.backbone}.{family.blocks}.{layer}.{name}": self.anatomy.projection(
                layer, name
            )
            for layer in self.layers
            for name in self.targets
        }

    def config(self, config_class: Any, **settings: Any) -> Any:
        """Return a PEFT configuration of the class that adapts these projections and no others."""
        known = {field.name for field in fields(config_class)}
        if "fan_in_fan_out" in known:
            first = self.anatomy.projection(self.layers[0], self.targets[0])
            settings["fan_in_fan_out"] = isinstance(first, Conv1D)
        if "layers_to_transform" not in known:
            settings["target_modules"] = list(self.modules)
        else:
            settings["target_modules"] = self.targets
            if len(self.layers) < self.anatomy.n_layers:
                settings["layers_to_transform"] = self.layers
                settings["layers_pattern"] = self.anatomy.family.blocks
        return config_class(task_type="CAUSAL_LM", **settings)
