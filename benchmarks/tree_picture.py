"""Draw what a prefix tree saves on three short rows, as an SVG.

python -m benchmarks.tree_picture docs/pictures/tree.svg
"""

import sys
from pathlib import Path

ROWS = ("the cat sat ON THE MAT", "the cat sat ON A CHAIR", "the cat ran AWAY")
STEP_X, STEP_Y, LEFT, TOP = 78, 34, 14, 66  # pixels between tokens and rows, and around them


def _token(word: str, x: float, y: float) -> str:
    fill = "#cfe8dd" if word.isupper() else "#e7e7ea"
    return (
        f'<rect x="{x}" y="{y}" width="66" height="24" rx="4" fill="{fill}"/>'
        f'<text x="{x + 33}" y="{y + 17}" text-anchor="middle">{word.lower()}</text>'
    )


def picture() -> str:
    """Return the SVG: each row by itself, and the tree of them below."""
    rows = [row.split() for row in ROWS]
    seen: dict[tuple[str, ...], tuple[float, float]] = {}
    below = TOP + STEP_Y * len(rows) + 30
    drawn, links = [], []
    for r, row in enumerate(rows):
        y = TOP + STEP_Y * r
        for i, word in enumerate(row):
            drawn.append(_token(word, LEFT + STEP_X * i, y))
            prefix = tuple(row[: i + 1])
            if prefix not in seen:
                x, node_y = LEFT + STEP_X * i, below + 16 + STEP_Y * r
                seen[prefix] = (x, node_y)
                drawn.append(_token(word, x, node_y))
                if i:
                    px, py = seen[prefix[:-1]]
                    links.append(
                        f'<path d="M{px + 66} {py + 12}L{x} {node_y + 12}" stroke="#888"/>'
                    )
    n_flat = sum(map(len, rows))
    width, height = LEFT + STEP_X * 6 + 2, below + 16 + STEP_Y * len(rows)
    label = f"{n_flat} tokens in rows, {len(seen)} in the tree"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
            'font-family="sans-serif" font-size="14" fill="#222">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{LEFT}" y="24" font-weight="bold">Row by row: {n_flat} tokens</text>',
            f'<text x="{LEFT}" y="{below}" font-weight="bold">As a tree: {len(seen)} tokens</text>',
            f'<text x="{LEFT}" y="46">grey: prompt, green: trained</text>',
            *links,
            *drawn,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
