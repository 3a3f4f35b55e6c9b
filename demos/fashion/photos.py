"""Fashion-MNIST (70,000 photos of clothes, 28×28, ten kinds) from Debian's package or its address, or else drawn images."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

KINDS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
UNSEEN = ("bag", "sandal")  # left out of the pre-training
PACKAGE = "dataset-fashion-mnist"
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FILES = {  # with the SHA-256 of what is packed in them
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
SIDE = 32  # pixels of a picture: 28 and a border

Photos = NDArray[np.uint8]  # (n, 32, 32)


def load_photos(cache: Path) -> tuple[Photos, NDArray[np.uint8], str]:
    """All photos with the numbers of their kinds, and their source; downloads are stored in `cache`."""
    folder = cache / "fashion-mnist"
    folder.mkdir(parents=True, exist_ok=True)
    reasons: list[str] = []
    for fetch in (_from_debian, _from_address):
        if (held := _held(folder)) is None:
            reasons.append(fetch(folder))
    if held is None and (held := _held(folder)) is None:
        print(f"Fashion-MNIST cannot be had ({'; '.join(filter(None, reasons))}); drawn pictures take its place.")
        return (*drawn_photos(), "drawn pictures")
    images, labels = held
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2))), np.frombuffer(labels, np.uint8, offset=8), "Fashion-MNIST"


def _held(folder: Path) -> tuple[bytes, bytes] | None:
    """The unpacked images and labels, or None if one is missing or damaged."""
    found = []
    for name, digest in FILES.items():
        try:
            content = gzip.decompress((folder / name).read_bytes())
        except (OSError, EOFError, zlib.error):  # not there, or cut short
            return None
        if hashlib.sha256(content).hexdigest() != digest:
            return None
        found.append(content)
    return found[0], found[1]


def _from_debian(folder: Path) -> str:
    """Unpacks Debian's package without root; says why if that fails."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "no apt-get"
    with tempfile.TemporaryDirectory() as place:
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=place, check=True, capture_output=True, text=True, timeout=300)
            [package] = Path(place).glob("*.deb")
            subprocess.run(["dpkg", "-x", str(package), place], check=True, capture_output=True, text=True, timeout=300)
        except subprocess.CalledProcessError as error:
            return f"apt-get download {PACKAGE}: {' '.join(error.stderr.split())[-200:]}"
        except (subprocess.TimeoutExpired, ValueError) as error:
            return f"apt-get download {PACKAGE}: {error}"
        for name in FILES:
            found = next(Path(place).rglob(name), None)
            if found is None:
                return f"{PACKAGE} holds no {name}"
            shutil.copy(found, folder / name)
    return ""


def _from_address(folder: Path) -> str:
    try:
        for name in FILES:
            with urllib.request.urlopen(f"{ADDRESS}/{name}", timeout=60) as answer:
                (folder / name).write_bytes(answer.read())
    except (http.client.HTTPException, OSError) as error:  # URLError is an OSError
        return f"{ADDRESS}: {error}"
    return "" if _held(folder) else f"{ADDRESS}: other files than expected"


def drawn_photos(each: int = 2000) -> tuple[Photos, NDArray[np.uint8]]:
    """Bright shapes on black, ten kinds of proportions and holes, a little different each time."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    photos, labels = [], []
    for label in range(len(KINDS)):
        for _ in range(each):
            width, height = generator.uniform(4, 6, 2) + np.array([label % 5, 5 - label % 5]) * 1.6
            inside = np.maximum(abs(x) / width, abs(y) / height) < 1 if label % 2 else np.hypot(x / width, y / height) < 1
            if label >= 5:
                inside &= np.hypot(x, y) > generator.uniform(2, 3.5)
            shade = generator.uniform(120, 230) + generator.uniform(-3, 3) * x + generator.uniform(-3, 3) * y
            photos.append(np.where(inside, shade, 0).clip(0, 255).astype(np.uint8))
            labels.append(label)
    return np.stack(photos), np.array(labels, np.uint8)


def in_colour(photos: Photos) -> NDArray[np.uint8]:
    """(n, 32, 32, 3)."""
    return np.repeat(photos[..., None], 3, axis=-1)


def inverted(photos: Photos) -> Photos:
    """The look of the second adapter: dark clothes on a light ground, in a dark frame."""
    found = 255 - photos
    found[:, :2], found[:, -2:], found[:, :, :2], found[:, :, -2:] = 0, 0, 0, 0
    return found


def caption(kind: str, *, look: str = "") -> str:
    """The caption of a photo."""
    return f"a {look} photo of a {kind}" if look else f"a photo of a {kind}"


def save_album(folder: Path, photos: Photos, captions: list[str]) -> Path:
    """A folder of PNG files with captions beside them, as `lorakeet finetune` reads it; replaces an old one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, (photo, text) in enumerate(zip(in_colour(photos), captions, strict=True)):
        Image.fromarray(photo).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def save_sheet(titles: list[str], rows: list[list[Path]], file: Path) -> Path:
    """One PNG of many: a title, and below it a row of pictures four times as large."""
    shown = [[Image.open(one).resize((4 * SIDE, 4 * SIDE), Image.Resampling.NEAREST) for one in row] for row in rows]
    side, line = 4 * SIDE + 4, 16
    sheet = Image.new("RGB", (max(map(len, rows)) * side, len(rows) * (side + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, row) in enumerate(zip(titles, shown, strict=True)):
        draw.text((2, number * (side + line) + 2), title, fill="black")
        for place, picture in enumerate(row):
            sheet.paste(picture, (place * side, number * (side + line) + line))
    sheet.save(file)
    return file
