"""Draws docs/explain/ranks-TASK.svg from a result of benchmarks/ranks.py: `python docs/draw_ranks.py RESULT.json`."""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "explain"
BASELINE = "uniform-16"
LEFT, WIDTH, RIGHT, LINE, TOP = 190, 420, 250, 22, 46  # pixels
COLOURS = {"better": "#0a7d4f", "worse": "#b3261e", "no difference shown": "#555"}
STYLE = "text{font:12px sans-serif;fill:#333}.small{fill:#666;font-size:11px}"


def picture(task: str, arms: dict[str, dict[str, Any]], task_seeds: str) -> str:
    """One line an arm, fewest parameters first: its log-loss minus that of uniform rank 16, with its 95 % interval.

    An arm of too few seeds for an interval has none.
    """
    shown = {name: arm for name, arm in arms.items() if "gap" in arm or name == BASELINE}
    lines = sorted(shown.items(), key=lambda item: (item[1]["parameters"], item[0]))
    edges = [value for _, arm in lines if "gap" in arm for value in (arm["low"], arm["high"])] + [0.0]
    low, high = min(edges), max(edges)
    room = (high - low or 1.0) * 0.06
    low, high = low - room, high + room

    def x(value: float) -> float:
        return round(LEFT + WIDTH * (value - low) / (high - low), 1)

    height = TOP + LINE * len(lines) + 34
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" role="img">',
        f"<title>{escape(task)}: log-loss on test rows minus that of uniform rank 16</title><style>{STYLE}</style>",
        f'<rect width="100%" height="100%" fill="#fff"/><text x="8" y="18">{escape(task)}: log-loss on test rows minus that of '
        f"{BASELINE}, 95 % interval over rows and seeds; {task_seeds}</text>",
        f'<text class="small" x="8" y="36">adapter, pair parameters</text>'
        f'<text class="small" x="{LEFT + WIDTH + 8}" y="36">accuracy, verdict (Holm)</text>',
        f'<line x1="{x(0)}" x2="{x(0)}" y1="{TOP - 4}" y2="{height - 28}" stroke="#999" stroke-dasharray="3 3"/>',
    ]
    for number, (name, arm) in enumerate(lines):
        y = TOP + LINE * number + 12
        verdict = arm.get("verdict", "baseline")
        colour = COLOURS.get(verdict, "#000")
        size = f"{arm['parameters'] / 1e6:.2f}M"
        found.append(f'<text x="8" y="{y + 4}">{escape(name)} <tspan class="small">{size}</tspan></text>')
        if "gap" in arm:
            ends = f'x1="{x(arm["low"])}" x2="{x(arm["high"])}" y1="{y}" y2="{y}"'
            found.append(f'<line {ends} stroke="{colour}" stroke-width="2"/>')
        found.append(f'<circle cx="{x(arm.get("gap", 0.0))}" cy="{y}" r="4" fill="{colour}"/>')
        said = f"{100 * arm['accuracy']:.1f} %, {verdict}"
        found.append(f'<text x="{LEFT + WIDTH + 8}" y="{y + 4}" style="fill:{colour}">{escape(said)}</text>')
    for tick in _ticks(low, high):
        found.append(f'<text class="small" x="{x(tick)}" y="{height - 10}" text-anchor="middle">{tick:+g}</text>')
    return "\n".join([*found, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within the range."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def main(result: Path) -> None:
    tasks = json.loads(result.read_text(encoding="utf-8"))["tasks"]
    for task, content in tasks.items():
        counts = {len(arm["seeds"]) for arm in content["arms"].values()}
        seeds = f"{min(counts)} seeds" if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds"
        path = FOLDER / f"ranks-{task}.svg"
        path.write_text(picture(task, content["arms"], seeds.replace("1 seeds", "1 seed")), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
