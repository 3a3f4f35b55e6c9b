"""The drawings of docs/explain/speed.md as SVG, from results of benchmarks; `docs/draw_speed.py` says which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

TITLES = {
    "length": "tokens of a row",
    "rank": "rank of every pair",
    "adapters": "adapters in one step",
    "size": "parameters of the base",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 320, 190, 64, 46, 44  # pixels of a panel, and around it
OURS, OTHERS, LAW, REQUIRED = "#0a5f9e", "#8a8a8a", "#999", "#b3261e"
COLOURS = ("#0a5f9e", "#0a7d4f", "#7a3e9d", "#b3261e", "#c77700", "#555", "#00838f", "#8d6e63", "#999")
STYLE = "text{font:12px sans-serif;fill:#333}.small{fill:#666;font-size:11px}"


def sheet(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A whole drawing."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title><style>{STYLE}</style>{ground}", *parts, "</svg>"]) + "\n"


def text(x: float, y: float, said: str, *, small: bool = False, anchor: str = "start", colour: str = "") -> str:
    size, fill = ' class="small"' if small else "", f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{size}{fill}>{escape(said)}</text>'


def line(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def speeds(title: str, contenders: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar a contender, the fastest on top: tokens a second, with the lowest and highest round as a line."""
    left, width, step = 190, 420, 26
    rows = sorted(contenders.items(), key=lambda item: -item[1]["tokens_per_second"]["median"])
    most = max(row["tokens_per_second"]["max"] for _, row in rows)
    parts = [text(8, 18, title)]
    for number, (name, row) in enumerate(rows):
        y, speed = 34 + step * number, row["tokens_per_second"]
        other = bool(row.get("trains_otherwise"))
        colour = LAW if other else OURS if name.startswith("lorakeet") else OTHERS
        low, high, length = (left + width * speed[key] / most for key in ("min", "max", "median"))
        parts += [
            text(8, y + 13, f"{name} (trains otherwise)" if other else name),
            f'<rect x="{left}" y="{y}" width="{length - left:.1f}" height="18" fill="{colour}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="#000"/>',
            text(high + 6, y + 13, f"{speed['median']:,.0f} tokens/s, {row['peak_bytes']['median'] / 1e9:.2f} GB"),
        ]
    return sheet(left + width + 170, 44 + step * len(rows), title, parts)


def to_loss(title: str, found: Mapping[str, Any]) -> str:
    """Held-out loss over seconds of training, both scales logarithmic: a line a contender (its first round), and the target."""
    left, top, width, height = 70, 34, 560, 300
    curves = {name: row["rounds"][0]["points"][1:] for name, row in found["contenders"].items()}  # the base costs no time
    seconds = [point["seconds"] for points in curves.values() for point in points]
    losses = [point["loss"] for points in curves.values() for point in points] + [found["target"]]
    spans = [(math.log10(min(each)) - 0.03, math.log10(max(each)) + 0.03) for each in (seconds, losses)]

    def place(second: float, loss: float) -> tuple[float, float]:
        across, up = (
            (math.log10(value) - low) / (high - low) for value, (low, high) in zip((second, loss), spans, strict=True)
        )
        return left + width * across, top + height * (1 - up)

    y = place(seconds[0], found["target"])[1]
    parts = [
        text(8, 18, title),
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>',
        line([(left, y), (left + width, y)], LAW, dashed=True),
        text(left - 6, y + 4, f"{found['target']:.3f}", small=True, anchor="end"),
        text(left - 6, top + 8, f"{max(losses):.2f}", small=True, anchor="end"),
        text(left + width, top + height + 18, f"{max(seconds):,.0f} s", small=True, anchor="end"),
        text(left, top + height + 18, f"{min(seconds):,.0f} s of training", small=True),
    ]
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts += [
            line([place(point["seconds"], point["loss"]) for point in points], colour),
            text(left + width + 12, top + 14 + 18 * number, name, colour=colour),
        ]
    return sheet(left + width + 160, top + height + 30, title, parts)


def curves(title: str, found: Mapping[str, Sequence[float]]) -> str:
    """The training loss of each step, on a logarithmic scale: a line a run."""
    left, top, width, height = 70, 34, 560, 240
    losses = [loss for each in found.values() for loss in each]
    low, high = math.log10(min(losses)) - 0.03, math.log10(max(losses)) + 0.03

    def place(step: int, loss: float, steps: int) -> tuple[float, float]:
        return left + width * step / max(1, steps - 1), top + height * (high - math.log10(loss)) / (high - low)

    parts = [
        text(8, 18, title),
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>',
        text(left - 6, top + 8, f"{max(losses):.2f}", small=True, anchor="end"),
        text(left - 6, top + height, f"{min(losses):.2f}", small=True, anchor="end"),
        text(left, top + height + 18, "step 1", small=True),
        text(left + width, top + height + 18, f"step {max(map(len, found.values()))}", small=True, anchor="end"),
    ]
    for number, (name, each) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts += [
            line([place(step, loss, len(each)) for step, loss in enumerate(each)], colour),
            text(left + width + 12, top + 14 + 18 * number, name, colour=colour),
        ]
    return sheet(left + width + 160, top + height + 30, title, parts)


def shares(title: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """A bar a case: the step's share of the machine's rate, and the required share."""
    left, width, step = 230, 400, 20
    parts = [text(8, 18, title)]
    for number, one in enumerate(lines):
        y, share = 34 + step * number, one["shares"]["step"]
        name = f"{one['base']}, {one['length']:,} tokens, {one['learnt']}, {one['layout']}"
        required = left + width * one["asked"]
        parts += [
            text(8, y + 12, name, small=True),
            f'<rect x="{left}" y="{y}" width="{width * share:.1f}" height="14" fill="{OURS}"/>',
            f'<line x1="{required:.1f}" x2="{required:.1f}" y1="{y - 2}" y2="{y + 16}" stroke="{REQUIRED}" stroke-width="2"/>',
            text(left + width * max(share, one["asked"]) + 8, y + 12, f"{share:.2f}", small=True),
        ]
    return sheet(left + width + 60, 44 + step * len(lines), title, parts)


def growth(found: Mapping[str, Any]) -> str:
    """A panel an axis, both scales logarithmic: microseconds a token as measured, and the law."""
    axes = [axis for axis in TITLES if axis in found["axes"]]
    columns = 2
    rows = math.ceil(len(axes) / columns)
    width, height = columns * (LEFT + WIDTH + GAP), rows * (TOP + HEIGHT + GAP) + 28
    about = f"{found['machine']['cpu']}, {found['machine']['cores']} cores, products in {found['products']}"
    parts = [
        f'<text x="8" y="18">Microseconds a token of a training step on {escape(about)}: '
        f'<tspan fill="{OURS}">measured</tspan>, <tspan fill="{LAW}">the law (its FLOPs)</tspan></text>'
    ]
    for number, axis in enumerate(axes):
        x, y = number % columns * (LEFT + WIDTH + GAP) + LEFT, number // columns * (TOP + HEIGHT + GAP) + TOP + 28
        parts.append(panel(TITLES[axis], found["axes"][axis], x, y))
    return sheet(width, height, "Microseconds a token of a training step", parts)


def panel(title: str, points: Sequence[Mapping[str, Any]], left: float, top: float) -> str:
    """One axis; its values are at equal distances."""
    values = [one[key] for one in points for key in ("us", "law_us")]
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08

    def place(at: int, value: float) -> tuple[float, float]:
        return left + WIDTH * (at + 0.5) / len(points), top + HEIGHT * (high - math.log10(value)) / (high - low)

    found = [
        text(left, top - 10, title),
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>',
        line([place(at, one["law_us"]) for at, one in enumerate(points)], LAW, dashed=True),
        line([place(at, one["us"]) for at, one in enumerate(points)], OURS),
    ]
    for at, one in enumerate(points):
        x, y = place(at, one["us"])
        found += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{OURS}"/>',
            text(x, y - 8, f"{one['us']:,.0f}", small=True, anchor="middle"),
            text(x, top + HEIGHT + 16, str(one["at"]), small=True, anchor="middle"),
        ]
    return "\n".join(found)
