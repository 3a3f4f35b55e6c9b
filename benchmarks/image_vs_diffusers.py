"""Claim: LoRA on Stable Diffusion is faster than diffusers' own example script, in less memory, and learns as much.

    python benchmarks/image_vs_diffusers.py [--model FOLDER --train FOLDER --held-out FOLDER] [--rounds N] [--steps N]

Without folders: the base model and the pictures of `make quickstart-images`, which must have run. Both contenders train rank-16
pairs on the attention of the UNet with AdamW at one rate, each in a process of its own, in turns. diffusers' script encodes the
pictures and captions in every step; Lorakeet's latents are encoded once, and the time of that is counted in its rate.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, write_result
from harness.processes import rotated, run_module, summary

from lorakeet.models.gguf_copy import cache_folder

MODULE = "contenders.image_training"
CONTENDERS = ("lorakeet", "diffusers")
FASTER, SMALLER, WORSE = 2.0, 0.7, 0.005  # what is claimed of images/s and memory; how much more held-out loss is allowed


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    about = origin()
    rounds: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="lorakeet-bench-") as temporary:
        folder = Path(temporary)
        for number in range(given.rounds):
            shutil.rmtree(folder / "cache", ignore_errors=True)  # each round encodes for itself
            found: dict[str, Any] = {}
            for who in rotated(CONTENDERS, number):
                found[who] = child(given, folder, who=who, out=str(folder / f"{who}-{number}"))
            places = {who: str(folder / f"{who}-{number}") for who in CONTENDERS}
            found["held_out"] = child(given, folder, who="judge", adapters=places)
            rounds.append(found)
            show(found, given)
    rates = [{who: rate(found[who], given) for who in CONTENDERS} for found in rounds]
    faster = summary(one["lorakeet"] / one["diffusers"] for one in rates)
    smaller = summary(found["lorakeet"]["peak"] / found["diffusers"]["peak"] for found in rounds)
    worse = summary(found["held_out"]["lorakeet"] - found["held_out"]["diffusers"] for found in rounds)
    holds = faster.median >= FASTER and smaller.median <= SMALLER and worse.median <= WORSE
    print(f"\nimages/s {faster.show()}× (at least {FASTER}), memory {smaller.show()}× (at most {SMALLER}), "
          f"held-out loss {worse.show(4)} (at most {WORSE} more): {'holds' if holds else 'DOES NOT HOLD'}")  # fmt: skip
    content = {
        "settings": {key: str(value) for key, value in vars(given).items()}, "rounds": rounds, "holds": holds,
        "images_per_second": faster.to_mapping(), "memory": smaller.to_mapping(), "held_out_difference": worse.to_mapping(),
    }  # fmt: skip
    print(f"Written: {write_result('image_vs_diffusers', content, seed=0, about=about, folder=given.results)}")
    return 0 if holds else 1


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    demo = cache_folder() / "fashion"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo / "base-fashion-mnist", help="a pipeline that diffusers saved")
    parser.add_argument("--train", type=Path, default=demo / "albums" / "kind", help="PNG files with captions beside them")
    parser.add_argument("--held-out", type=Path, default=demo / "albums" / "kind-held-out", help="the same, to judge by")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights of both")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    missing = [str(folder) for folder in (given.model, given.train, given.held_out) if not folder.is_dir()]
    if missing:
        parser.error(f"{', '.join(missing)} not found; run make quickstart-images first, or name folders")
    return given


def rate(found: dict[str, Any], given: argparse.Namespace) -> float:
    """Pictures a second over the run that was asked for: its timed steps, and for Lorakeet its share of encoding."""
    seconds = summary(found["seconds"]).median * given.steps + found["prepared"]
    return given.steps * given.batch / seconds


def child(given: argparse.Namespace, folder: Path, **more: Any) -> dict[str, Any]:
    asked = {
        "model": str(given.model.resolve()), "train": str(given.train.resolve()), "held_out": str(given.held_out.resolve()),
        "steps": given.steps, "batch": given.batch, "rate": given.rate, "dtype": given.dtype, "rank": 16, "alpha": 16,
        "cache": str(folder / "cache"), **more,
    }  # fmt: skip
    question, answer = folder / "asked.json", folder / "answer.json"
    question.write_text(json.dumps(asked), encoding="utf-8")
    run_module(sys.executable, MODULE, [str(question), str(answer)], log=folder / "log")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def show(found: dict[str, Any], given: argparse.Namespace) -> None:
    for who in CONTENDERS:
        one = found[who]
        print(f"{who:10} {rate(one, given):7.2f} images/s, step {summary(one['seconds']).median:.3f} s, "
              f"peak {one['peak'] / 1e9:.2f} GB, held-out loss {found['held_out'][who]:.4f} "
              f"(base {found['held_out']['base']:.4f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
