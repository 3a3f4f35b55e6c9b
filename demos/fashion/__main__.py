"""From nothing to two adapters of a small image model that swap and mix: python -m demos.fashion [--quick] [--out FOLDER].

1. A latent diffusion model in Stable Diffusion's own classes is pre-trained on Fashion-MNIST without two of its ten kinds.
2. `lorakeet finetune` trains an adapter on 40 photos of a kind that the model never saw, and one on 40 photos with a new look.
3. Base, adapters and their mix are evaluated on photos that none of them saw, also on the new kind in the new look.
4. `lorakeet generate` draws with each of them, and with both, in one batch.

The model is a small stand-in, since no weights of the real one come with this package. With `model: stable-diffusion-v1-5/…` and
a folder of your photos, examples/photos.yaml is the real thing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from demos.fashion.photos import KINDS, UNSEEN, Photos, caption, drawn_photos, inverted, load_photos, save_album, save_sheet
from demos.fashion.pretrain import Budget, pretrained
from lorakeet.config import RunConfig, read_run
from lorakeet.errors import LorakeetError
from lorakeet.evaluate.compare import compare_losses
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.detect import read_adapter
from lorakeet.kinds.images.data.folder import read_album
from lorakeet.kinds.images.data.split import evaluation_groups
from lorakeet.kinds.images.drawing_options import GenerateOptions
from lorakeet.kinds.images.generate import generate
from lorakeet.kinds.images.model.latent_cache import Captions, encode_images
from lorakeet.kinds.images.model.model import load_image_model, put_image_adapter
from lorakeet.kinds.images.task import denoising_errors
from lorakeet.merging.combine import CombineSpec, combination
from lorakeet.models.files.gguf_copy import cache_folder
from lorakeet.models.inject import activate
from lorakeet.runs.output_paths import require_empty
from lorakeet.verbs.finetune import finetune

LOOK = "negative"
KIND = UNSEEN[0]
TRAIN, HELD_OUT = 40, 60
PER_PROMPT = 4  # pictures of each prompt in the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"), help="folder for runs and pictures")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "fashion", help="where photos and base model are kept")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each adapter")
    parser.add_argument("--quick", action="store_true", help="drawn pictures and few steps: does it run?")
    options = parser.parse_args()
    try:
        show(options, Console())
    except LorakeetError as error:
        sys.exit(f"Error: {error}")


def show(options: argparse.Namespace, console: Console) -> None:
    """Runs the whole demonstration. Raises ConfigError at once if an earlier run is in the way."""
    require_empty(options.out)
    quick = options.quick
    photos, labels, source = (*drawn_photos(each=40), "drawn") if quick else load_photos(options.cache)
    budget = Budget(2, 2, 4) if quick else Budget()
    steps, sizes = (2, (8, 6)) if quick else (options.steps, (TRAIN, HELD_OUT))
    base = options.cache / f"base-{'quick' if quick else source.split()[0].lower()}"
    console.print(f"{len(photos):,} pictures ({source}); base model without {' and '.join(UNSEEN)}. It is a small stand-in.")
    seconds: dict[str, float] = {}
    with timed(seconds, "base"):
        pretrained(base, photos, labels, budget)
    albums = make_albums(options.cache / "albums", photos, labels, sizes)
    runs = {}
    for name in ("kind", "look"):
        config = settings(base, albums, name, out=options.out / name, steps=steps, quick=quick)
        console.rule(f"{name}: {len(list(albums[name].glob('*.png')))} photos in {albums[name]}")
        with timed(seconds, name):
            finetune(config, console=console)
        runs[name] = options.out / name
    console.rule("both: the two adapters side by side, and their sum")
    with timed(seconds, "compared"):
        crossed = cross_table(base, runs, albums, config, console)
    with timed(seconds, "drawn"):
        sheet = draw(base, runs, options.out / "pictures", console, quick=quick)
    for name, found in (("crossed", crossed), ("seconds", seconds)):
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"Open {sheet} and {' and '.join(str(run / 'report.html') for run in runs.values())}.", soft_wrap=True)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Records how long the block took."""
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began


def make_albums(folder: Path, photos: Photos, labels: NDArray[np.uint8], sizes: tuple[int, int]) -> dict[str, Path]:
    """Writes training and held-out albums of the new kind and of the new look, and a held-out album of both."""
    train, held_out = sizes
    kind = photos[labels == KINDS.index(KIND)]
    seen = np.flatnonzero(~np.isin(labels, [KINDS.index(name) for name in UNSEEN]))
    some = np.random.default_rng(0).permutation(seen)[: train + held_out]
    looks = [caption(KINDS[labels[row]], look=LOOK) for row in some]
    parts = {
        "kind": (kind[:train], [caption(KIND)] * train),
        "kind-held-out": (kind[train : train + held_out], [caption(KIND)] * held_out),
        "look": (inverted(photos[some[:train]]), looks[:train]),
        "look-held-out": (inverted(photos[some[train:]]), looks[train:]),
        "both-held-out": (inverted(kind[train + held_out : train + 2 * held_out]), [caption(KIND, look=LOOK)] * held_out),
    }
    return {name: save_album(folder / name, *part) for name, part in parts.items()}


def settings(base: Path, albums: dict[str, Path], name: str, *, out: Path, steps: int, quick: bool) -> RunConfig:
    """The settings of one adapter's run, as `lorakeet finetune` would read them."""
    given: dict[str, Any] = {
        "kind": "image", "model.path": base, "model.dtype": "float32", "lora.rank": 8, "lora.alpha": 16,
        "lora.target_modules": "all-linear", "data.train": albums[name], "data.held_out": albums[f"{name}-held-out"],
        "train.steps": steps, "train.batch_size": 8, "diffusion.at_once": 8, "train.learning_rate": "2e-3",
        "diffusion.sample_steps": 2 if quick else 20, "diffusion.guidance": 3, "images.smallest": 28, "out": out,
        "evaluate.resamples": 500 if quick else 10_000,
    }  # fmt: skip
    return read_run(None, {key: str(value) for key, value in given.items()})


def cross_table(
    base: Path, runs: dict[str, Path], albums: dict[str, Path], config: RunConfig, console: Console
) -> dict[str, dict[str, Any]]:
    """The denoising loss of base, adapters and their sum on every held-out album, each compared with the base.

    On the new kind in the new look, which neither adapter saw, the sum is compared with each adapter too.
    """
    model = load_image_model(config.model, say=lambda _: None)
    adapters = {name: read_adapter(run) for name, run in runs.items()}
    adapters["both"] = combination(dict(adapters), CombineSpec(method="cat", weights=(1.0, 1.0))).combined().adapter
    for name, adapter in adapters.items():
        put_image_adapter(model, adapter, name)
    captions, spec = Captions(model, config.images, say=console.print), replace(config.evaluate, resamples=2000)
    title = "Denoising loss of the base, and what each adapter adds to it (less is better; 95 % intervals)"
    table = Table("held-out photos", "base", *adapters, title=title, title_justify="left")
    found: dict[str, dict[str, Any]] = {}
    for place in ("kind-held-out", "look-held-out", "both-held-out"):
        rows = encode_images(model, read_album(albums[place], config.images).rows, config.images, say=console.print)
        losses, groups = {}, evaluation_groups([picture.row for picture in rows], config.images)
        for name in (None, *adapters):
            activate(model.parts, name)
            sums, counts = denoising_errors(model, rows, captions, config.diffusion)
            losses[name or "base"] = RowLosses(name or "base", sums, counts.astype(np.int64), groups)
        cells = [f"{losses['base'].losses.sum() / losses['base'].tokens.sum():.4f}"]
        found[place] = {"base": float(cells[0])}
        for name in adapters:
            words, found[place][name] = compared_with(losses[name], losses["base"], spec)
            cells.append(words)
        table.add_row(place, *cells)
    console.print(table)
    for name in runs:
        words, found["both-held-out"][f"both against {name}"] = compared_with(losses["both"], losses[name], spec)
        console.print(f"On the new kind in the new look, which neither adapter saw, their sum against {name} alone: {words}.")
    return found


def compared_with(left: RowLosses, right: RowLosses, spec: EvaluateSpec) -> tuple[str, dict[str, float | str]]:
    """The paired difference of two systems' losses, in words and as plain values."""
    compared = compare_losses(left, right, spec)
    gap = compared.difference
    words = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f}), {compared.verdict}"
    return words, {"difference": gap.value, "low": gap.low, "high": gap.high, "verdict": compared.verdict}


def draw(base: Path, runs: dict[str, Path], out: Path, console: Console, *, quick: bool) -> Path:
    """Draws one batch in which every image has its own adapters, and a sheet of them all."""
    each = ("base", "kind", "look", "kind=1+look=1")
    prompts = (caption(KIND), caption(KIND), caption("coat", look=LOOK), caption(KIND, look=LOOK))
    generate(
        GenerateOptions(
            prompt=prompts,
            out=out,
            model=str(base),
            adapter=tuple(f"{name}={run}" for name, run in runs.items()),
            each=each,
            count=PER_PROMPT,
            steps=2 if quick else 30,
            guidance=3.0,
            dtype="float32",
        ),
        console=console,
    )
    files = sorted(out.glob("*.png"))
    rows = [files[start : start + PER_PROMPT] for start in range(0, len(files), PER_PROMPT)]
    return save_sheet([f"{mix}: {prompt}" for mix, prompt in zip(each, prompts, strict=True)], rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
