"""Draw the bars of docs/results/scenarios-quick.json: rates beside the best peer's, as an SVG.

python -m benchmarks.scenario_picture docs/results/scenarios-quick.json docs/pictures/rates.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

# Pixels; SCALE is one times the peer's rate. Narrow enough to be read on a phone.
WIDTH, LEFT, SCALE, ROW, TOP = 380, 10, 46, 42, 40
STYLE = 'font-family="sans-serif" font-size="14" fill="#222"'


def picture(result: dict[str, Any]) -> str:
    """Return the SVG: a bar a scenario, the fastest first, and a mark where both are equal."""
    scenarios = sorted(
        result["scenarios"].values(), key=lambda s: s["ratios"]["vs_best_peer"], reverse=True
    )
    peers = {s["ratios"]["best_peer"] for s in scenarios}
    height = TOP + ROW * len(scenarios) + 10
    title = f"Rate, times that of {' or '.join(sorted(peers)).capitalize()} (mark: as fast)"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}" {STYLE}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">{title}</text>',
    ]
    for i, scenario in enumerate(scenarios):
        ratio, y = scenario["ratios"]["vs_best_peer"], TOP + ROW * i
        color = "#2a7f62" if ratio >= 1 else "#b5523b"
        said, end = f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}", LEFT + SCALE * max(ratio, 1)
        lines += [
            f'<text x="{LEFT}" y="{y + 14}">{scenario["title"]}</text>',
            f'<rect x="{LEFT}" y="{y + 19}" width="{SCALE * ratio:.1f}" height="16" '
            f'fill="{color}"/>',
            f'<path d="M{LEFT + SCALE} {y + 19}v18" stroke="#222" stroke-width="2"/>',
            f'<text x="{end + 6:.1f}" y="{y + 32}">{said}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(picture(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
