"""What a model is made of, to be put together again whatever was wrapped, replaced or patched."""

from torch import nn

_PARTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class ModuleTree:
    """The modules of a model and what each holds now; numbers are not copied."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (module, dict(vars(module)), {part: dict(getattr(module, part)) for part in _PARTS})
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Give every module the attributes it had, and those what they held."""
        for module, attributes, parts in self._held:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            for part, held in parts.items():
                now = getattr(module, part)
                now.clear()
                now.update(held)
