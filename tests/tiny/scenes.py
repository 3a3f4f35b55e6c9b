"""Drawn pictures of kinds whose members are alike and yet different; and what is done to a photo that stays one photo."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Picture = Image.Image
SIDE = 256
CROSS = 4  # the shape of two colours


def _colour(generator: np.random.Generator, least: int = 0, most: int = 256) -> tuple[int, int, int]:
    red, green, blue = generator.integers(least, most, 3).tolist()
    return red, green, blue


def _ramp(above: tuple[int, ...], below: tuple[int, ...]) -> np.ndarray:
    """(SIDE, SIDE, 3): from one colour to another, downwards."""
    share = np.linspace(0, 1, SIDE)[:, None, None]
    return np.broadcast_to(np.array(above) * (1 - share) + np.array(below) * share, (SIDE, SIDE, 3)).copy()


def _rough(generator: np.random.Generator, strength: float) -> np.ndarray:
    """(SIDE, SIDE, 1): noise of all sizes, as leaves and stones have it."""
    found = np.zeros((SIDE, SIDE))
    for places in (8, 16, 32, 64, 128):
        small = Image.fromarray(generator.normal(0, 1, (places, places)).astype(np.float32))
        found += np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / places**0.5
    return (found * strength)[..., None]


def _picture(pixels: np.ndarray) -> Picture:
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def landscape(number: int) -> Picture:
    """A bright sky, two ridges and a dark ground: coarsely all alike."""
    generator = np.random.default_rng([1, number])
    pixels = _ramp((120, 170, 225), (215, 225, 240)) + _rough(generator, 4)
    x = np.arange(SIDE)
    for height, colour in ((0.45, (110, 130, 150)), (0.6, (70, 95, 60)), (0.75, (50, 70, 35))):
        ridge = height * SIDE + sum(
            generator.normal(0, 3) * np.sin(x / SIDE * 2 * np.pi * wave + generator.uniform(0, 7)) for wave in (1, 2, 3, 5)
        )
        ground = np.array(colour) + _rough(generator, 9)
        pixels = np.where((np.arange(SIDE)[:, None] > ridge[None])[..., None], ground, pixels)
    return _picture(pixels)


def draw_shape(
    image: Picture, kind: int, middle: tuple[float, float], half: tuple[float, float], colour: Any, *, line: int, inner: Any
) -> None:
    """Shape number `kind` of five, `half` as wide and high to each side; a ring's width is `line`, one bar of a CROSS `inner`."""
    draw, (x, y), (wide, high) = ImageDraw.Draw(image), middle, half
    box = (x - wide, y - high, x + wide, y + high)
    match kind:
        case 0:
            draw.ellipse(box, fill=colour)
        case 1:
            draw.rectangle(box, fill=colour)
        case 2:
            draw.polygon([(x, y - high), (x + wide, y + high), (x - wide, y + high)], fill=colour)
        case 3:
            draw.ellipse(box, outline=colour, width=line)
        case _:
            draw.rectangle((x - wide, y - high / 3, x + wide, y + high / 3), fill=colour)
            draw.rectangle((x - wide / 3, y - high, x + wide / 3, y + high), fill=inner)


def _thing(generator: np.random.Generator, image: Picture, share: float) -> Picture:
    """`image` with one of five shapes of about `share` of its side near its middle."""
    x, y = SIDE / 2 + generator.uniform(-0.06, 0.06, 2) * SIDE
    wide, high = share * SIDE / 2 * generator.uniform(0.6, 1, 2)
    colour = _colour(generator)
    kind = int(generator.integers(5))
    inner = _colour(generator) if kind == CROSS else colour
    draw_shape(image, kind, (x, y), (wide, high), colour, line=max(2, int(share * SIDE / 6)), inner=inner)
    return image


def on_a_coloured_ground(number: int) -> Picture:
    return _thing(np.random.default_rng([2, number]), Image.new("RGB", (SIDE, SIDE), (60, 110, 160)), 0.25)


def on_a_ramp(number: int) -> Picture:
    return _thing(np.random.default_rng([3, number]), _picture(_ramp((200, 190, 180), (90, 80, 120))), 0.25)


def on_white(number: int) -> Picture:
    return _thing(np.random.default_rng([4, number]), Image.new("RGB", (SIDE, SIDE), "white"), 0.4)


def character(number: int) -> Picture:
    """One figure in one pose on one ground: shirt, trousers, mouth, eyes and hair differ."""
    generator = np.random.default_rng([5, number])
    image = _picture(_ramp((235, 220, 200), (190, 200, 215)))
    draw = ImageDraw.Draw(image)
    draw.rectangle((103, 175, 125, 245), fill=(trousers := _colour(generator, 20, 220)), outline="black")
    draw.rectangle((131, 175, 153, 245), fill=trousers, outline="black")
    shirt = _colour(generator, 20, 220)
    draw.rectangle((60, 100, 196, 118), fill=shirt, outline="black")
    draw.rectangle((98, 100, 158, 178), fill=shirt, outline="black")
    draw.ellipse((96, 28, 160, 100), fill=(240, 200, 170), outline="black", width=2)
    draw.pieslice((94, 22, 162, 90), 180, 360, fill=_colour(generator, 10, 200))
    _face(draw, generator)
    return image


def other_face(number: int) -> Picture:
    """One figure in one pose and one dress, of which the face alone differs."""
    image = character(0)
    draw = ImageDraw.Draw(image)
    draw.rectangle((108, 58, 148, 94), fill=(240, 200, 170))
    _face(draw, np.random.default_rng([6, number]))
    return image


def _face(draw: ImageDraw.ImageDraw, generator: np.random.Generator) -> None:
    size, apart, high = generator.integers(2, 6), generator.integers(8, 16), generator.integers(62, 68)
    for x in (128 - apart, 128 + apart):
        draw.ellipse((x - size, high - size, x + size, high + size), fill=_colour(generator, 0, 120))
    wide, tall = generator.integers(4, 16), generator.integers(2, 9)
    start = 0 if generator.random() < 0.5 else 180
    draw.pieslice((128 - wide, 84 - tall, 128 + wide, 84 + tall), start, start + 180, fill=_colour(generator, 60, 180))


def camera(number: int) -> Picture:
    """One yard as a fixed camera sees it, with noise, and one small thing in it."""
    scene = np.random.default_rng(7)
    pixels = _ramp((150, 150, 160), (110, 105, 95)) + _rough(scene, 10)
    for _ in range(8):
        top, left, high, wide = scene.integers(0, 200, 2).tolist() + scene.integers(30, 90, 2).tolist()
        pixels[top : top + high, left : left + wide] = np.array(_colour(scene, 0, 256)) + _rough(scene, 4)[:high, :wide]
    generator = np.random.default_rng([7, number])
    image = _picture(pixels + generator.normal(0, 2, pixels.shape))
    x, y, wide, high = [*generator.integers(20, 236, 2).tolist(), *generator.integers(4, 9, 2).tolist()]
    ImageDraw.Draw(image).ellipse((x - wide, y - high, x + wide, y + high), fill=_colour(generator))
    return image


def garment(number: int) -> Picture:
    """Trousers on black at 28 pixels, as in Fashion-MNIST."""
    generator = np.random.default_rng([8, number])
    image = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    waist, hem, gap = generator.uniform(30, 50), generator.uniform(40, 65), generator.uniform(4, 20)
    grey = int(generator.integers(90, 250))
    for sign in (-1, 1):
        inner, outer = 128 + sign * gap, 128 + sign * hem
        fork = 128, generator.uniform(70, 120)
        draw.polygon([(128, 12), (128 + sign * waist, 12), (outer, 244), (inner, 244), fork], fill=grey)
    shade = np.asarray(image, np.float64)
    shade = np.where(shade > 0, shade + 4 * _rough(generator, 4)[..., 0], 0)
    return _picture(np.repeat(shade[..., None], 3, 2)).resize((28, 28), Image.Resampling.BOX)


def nearly_empty(number: int) -> Picture:
    """White paper with a few short strokes."""
    generator = np.random.default_rng([9, number])
    image = Image.new("RGB", (SIDE, SIDE), (250, 249, 246))
    draw = ImageDraw.Draw(image)
    for _ in range(int(generator.integers(1, 4))):
        x, y, across, down = [*generator.integers(100, 156, 2).tolist(), *generator.integers(-14, 15, 2).tolist()]
        draw.line((x, y, x + across, y + down), fill=_colour(generator, 0, 120), width=3)
    return image


def ramp(number: int) -> Picture:
    """Nothing but one colour that becomes another."""
    generator = np.random.default_rng([10, number])
    image = _picture(_ramp(_colour(generator, 60, 200), _colour(generator, 60, 200)))
    return image.rotate(90) if number % 2 else image


DIFFERENT: dict[str, Callable[[int], Picture]] = {
    one.__name__.replace("_", " "): one
    for one in (landscape, on_a_coloured_ground, on_a_ramp, on_white, character, other_face, camera, garment, nearly_empty, ramp)
}


def jpeg(quality: int) -> Callable[[Picture], Picture]:
    """What writes a picture as a JPEG file and reads it."""

    def encoded(image: Picture) -> Picture:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")

    return encoded


def scaled(factor: float) -> Callable[[Picture], Picture]:
    """What scales both sides by `factor`."""
    return lambda image: image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def cut(left: float, top: float, right: float, bottom: float) -> Callable[[Picture], Picture]:
    """What cuts such shares of the sides off."""

    def smaller(image: Picture) -> Picture:
        wide, high = image.size
        return image.crop((round(wide * left), round(high * top), round(wide * (1 - right)), round(high * (1 - bottom))))

    return smaller


def enhanced(kind: Callable[[Picture], ImageEnhance._Enhance], factor: float) -> Callable[[Picture], Picture]:
    """What Pillow's brightness, contrast, colour or sharpness do."""
    return lambda image: kind(image).enhance(factor)


def both(*changes: Callable[[Picture], Picture]) -> Callable[[Picture], Picture]:
    """One change after the other."""

    def changed(image: Picture) -> Picture:
        for change in changes:
            image = change(image)
        return image

    return changed


SAME: dict[str, Callable[[Picture], Picture]] = {
    "JPEG 95": jpeg(95),
    "JPEG 50": jpeg(50),
    "JPEG 30": jpeg(30),
    "half the side": scaled(0.5),
    "twice the side": scaled(2),
    "brightness 0.8": enhanced(ImageEnhance.Brightness, 0.8),
    "brightness 1.2": enhanced(ImageEnhance.Brightness, 1.2),
    "contrast 0.8": enhanced(ImageEnhance.Contrast, 0.8),
    "contrast 1.2": enhanced(ImageEnhance.Contrast, 1.2),
    "colours 0.7": enhanced(ImageEnhance.Color, 0.7),
    "mirrored": ImageOps.mirror,
    "cut by 2 % at one side": cut(0.02, 0, 0, 0),
    "cut by 4 % at two sides": cut(0.04, 0, 0, 0.04),
    "cut by 3 % all around": cut(0.03, 0.03, 0.03, 0.03),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "sharpened": enhanced(ImageEnhance.Sharpness, 2),
    "mirrored, JPEG 50": both(ImageOps.mirror, jpeg(50)),
    "cut by 3 %, brightness 1.1, JPEG 60": both(cut(0.03, 0, 0, 0.03), enhanced(ImageEnhance.Brightness, 1.1), jpeg(60)),
    "0.7 of the side, contrast 1.2, JPEG 50": both(scaled(0.7), enhanced(ImageEnhance.Contrast, 1.2), jpeg(50)),
}
