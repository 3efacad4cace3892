"""Draw the bars of docs/results/scenarios-quick.json: rates beside the best peer's, as an SVG.

python -m benchmarks.scenario_picture docs/results/scenarios-quick.json docs/pictures/rates.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

LEFT, SCALE, ROW, TOP = 370, 45, 30, 46  # pixels; SCALE is one times the peer's rate
STYLE = 'font-family="sans-serif" font-size="14" fill="#222"'


def picture(result: dict[str, Any]) -> str:
    """Return the SVG: a bar a scenario, the fastest first, and a line where both are equal."""
    scenarios = sorted(
        result["scenarios"].values(), key=lambda s: s["ratios"]["vs_best_peer"], reverse=True
    )
    peers = {s["ratios"]["best_peer"] for s in scenarios}
    height = TOP + ROW * len(scenarios) + 10
    title = f"Rate, times that of {' or '.join(sorted(peers)).capitalize()}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" role="img" '
        f'aria-label="{title}" {STYLE}>',
        f'<rect width="760" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">{title}</text>',
    ]
    for i, scenario in enumerate(scenarios):
        ratio, y = scenario["ratios"]["vs_best_peer"], TOP + ROW * i
        color = "#2a7f62" if ratio >= 1 else "#b5523b"
        width = SCALE * ratio
        lines += [
            f'<text x="{LEFT - 10}" y="{y + 16}" text-anchor="end">{scenario["title"]}</text>',
            f'<rect x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="20" fill="{color}"/>',
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 17}">{ratio:.2g}</text>',
        ]
    x = LEFT + SCALE
    lines.append(f'<path d="M{x} {TOP - 6}V{height - 8}" stroke="#222" stroke-dasharray="4 3"/>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(picture(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
