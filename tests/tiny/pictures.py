"""Small folders of drawn pictures with captions: discs and squares in a few colours, each a little different."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}


def drawn(number: int, *, size: tuple[int, int] = (32, 32)) -> tuple[np.ndarray, str]:
    """Picture `number` (height, width, 3), uint8, and its caption."""
    generator = np.random.default_rng(number)
    name = list(COLOURS)[number % 3]
    height, width = size
    y, x = np.mgrid[:height, :width]
    cy, cx = generator.uniform(0.35, 0.65, 2) * size
    reach = generator.uniform(0.2, 0.35) * min(size)
    inside = np.hypot(y - cy, x - cx) < reach if number % 2 else np.maximum(abs(y - cy), abs(x - cx)) < reach
    ground = Image.fromarray(generator.integers(0, 120, (4, 4, 3)).astype(np.uint8))
    pixels = np.array(ground.resize((width, height), Image.Resampling.BICUBIC))
    pixels[inside] = COLOURS[name]
    return pixels, f"{name} {'disc' if number % 2 else 'box'}"


def album(folder: Path, count: int, *, first: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    """A new folder with `count` pictures as PNG files and their captions beside them."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        pixels, caption = drawn(number, size=size)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return folder
