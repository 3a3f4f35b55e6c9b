"""Draws docs/explain/speed.svg from a result of benchmarks/growth.py: `python docs/draw_speed.py RESULT.json`."""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "explain" / "speed.svg"
TITLES = {
    "length": "tokens of a row",
    "rank": "rank of every pair",
    "adapters": "adapters in one step",
    "size": "parameters of the base",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 320, 190, 64, 46, 44  # pixels of a panel's field, and around it
MEASURED, LAW = "#0a5f9e", "#999"
STYLE = "text{font:12px sans-serif;fill:#333}.small{fill:#666;font-size:11px}"


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    OUT.write_text(picture(found), encoding="utf-8")
    print(f"Written: {OUT}")


def picture(found: dict[str, Any]) -> str:
    """A panel an axis, both scales logarithmic: microseconds a token as measured, and the law."""
    axes = [axis for axis in TITLES if axis in found["axes"]]
    columns = 2
    lines = math.ceil(len(axes) / columns)
    width, height = columns * (LEFT + WIDTH + GAP), lines * (TOP + HEIGHT + GAP) + 28
    about = f"{found['machine']['cpu']}, {found['machine']['cores']} cores, products in {found['products']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Microseconds a token of a training step</title><style>{STYLE}</style>",
        f'<rect width="100%" height="100%" fill="#fff"/><text x="8" y="18">Microseconds a token of a training step on '
        f'{escape(about)}: <tspan fill="{MEASURED}">measured</tspan>, <tspan fill="{LAW}">the law (its FLOPs)</tspan></text>',
    ]
    for number, axis in enumerate(axes):
        x, y = number % columns * (LEFT + WIDTH + GAP) + LEFT, number // columns * (TOP + HEIGHT + GAP) + TOP + 28
        parts.append(panel(TITLES[axis], found["axes"][axis], x, y))
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(title: str, points: list[dict[str, Any]], left: float, top: float) -> str:
    """One axis."""
    across = [float(number) for number in range(len(points))]  # the values stand at equal distances
    values = [one[key] for one in points for key in ("us", "law_us")]
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08

    def place(at: float, value: float) -> str:
        x = left + WIDTH * (at + 0.5) / len(points)
        return f"{x:.1f},{top + HEIGHT * (high - math.log10(value)) / (high - low):.1f}"

    found = [
        f'<text x="{left}" y="{top - 10}">{escape(title)}</text>',
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>',
    ]
    for key, colour, dashes in (("law_us", LAW, ' stroke-dasharray="4 3"'), ("us", MEASURED, "")):
        line = " ".join(place(at, one[key]) for at, one in zip(across, points, strict=True))
        found.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
    for at, one in zip(across, points, strict=True):
        x, y = place(at, one["us"]).split(",")
        found.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{MEASURED}"/>')
        found.append(f'<text class="small" x="{x}" y="{float(y) - 8:.1f}" text-anchor="middle">{one["us"]:,.0f}</text>')
        found.append(f'<text class="small" x="{x}" y="{top + HEIGHT + 16}" text-anchor="middle">{escape(str(one["at"]))}</text>')
    return "\n".join(found)


if __name__ == "__main__":
    main()
