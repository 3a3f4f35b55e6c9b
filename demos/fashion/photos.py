"""Fashion-MNIST (70,000 photos of clothes, 28×28, ten kinds) from Debian's package or its address, else drawn pictures."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KINDS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
UNSEEN = ("bag", "sandal")  # left out of the pre-training
PACKAGE = "dataset-fashion-mnist"
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
SIDE = 32  # pixels of a picture: 28 and a border

Photos = NDArray[np.uint8]  # (n, 32, 32)


def load_photos(cache: Path) -> tuple[Photos, NDArray[np.uint8], str]:
    """All photos with the numbers of their kinds, and where they came from; downloads are kept in `cache`."""
    folder = cache / "fashion-mnist"
    if not all((folder / name).is_file() for name in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        why = _from_debian(folder) and _from_address(folder)
        if why:
            print(f"Fashion-MNIST cannot be had ({why}); drawn pictures take its place.")
            return (*drawn_photos(), "drawn pictures")
    images, labels = ((folder / name).read_bytes() for name in FILES)
    pixels = np.frombuffer(gzip.decompress(images), np.uint8, offset=16).reshape(-1, 28, 28)
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2))), np.frombuffer(gzip.decompress(labels), np.uint8, offset=8), "Fashion-MNIST"


def _from_debian(folder: Path) -> str:
    """Unpacks Debian's package without root; says why where that fails."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "no apt-get"
    with tempfile.TemporaryDirectory() as place:
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=place, check=True, capture_output=True, timeout=300)
            [package] = Path(place).glob("*.deb")
            subprocess.run(["dpkg", "-x", str(package), place], check=True, capture_output=True, timeout=300)
        except (subprocess.SubprocessError, ValueError) as error:
            return f"apt-get download {PACKAGE}: {type(error).__name__}"
        for name in FILES:
            shutil.copy(next(Path(place).rglob(name)), folder / name)
    return ""


def _from_address(folder: Path) -> str:
    try:
        for name in FILES:
            with urllib.request.urlopen(f"{ADDRESS}/{name}", timeout=60) as answer:
                (folder / name).write_bytes(answer.read())
    except (urllib.error.URLError, OSError) as error:
        return f"{ADDRESS}: {error}"
    return ""


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
    """What a photo is called."""
    return f"a {look} photo of a {kind}" if look else f"a photo of a {kind}"


def save_album(folder: Path, photos: Photos, captions: list[str]) -> Path:
    """A folder of PNG files with captions beside them, as `lorakeet finetune` reads it; made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, (photo, text) in enumerate(zip(in_colour(photos), captions, strict=True)):
        Image.fromarray(photo).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder
