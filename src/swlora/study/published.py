"""What was published for the comparison that this package repeats: the original's only table.

One run an arm, no controls, no intervals. Neither the quality's metric nor the definition of
"faster" was given there, so the figures stand beside ours, not on one scale with them.
"""

from swlora.study.compared import Published

_ROWS = (
    ("LoRA", None, 68.40),
    ("LoRA in the layers with super weights", 25.47, 66.85),
    ("LoRA+", 0.0, 69.59),
    ("DoRA", -36.0, 68.22),
    ("AdaLoRA", -11.0, 69.31),
    ("PiSSA", 0.0, 67.47),
)
PUBLISHED = [Published(method, faster, quality) for method, faster, quality in _ROWS]
