"""The certificate of a run on images: what is on disk draws what was trained, on a base that training left as it was.

frozen weights   the digest of every frozen number, before training and after it
adapter on disk  the pipeline loaded once more with the adapter read from disk, against the live one: latents of samples
base untouched   the pipeline loaded once more, against the live one with its adapter off: latents of samples
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakeet.evaluate.certificate import Certificate, Check, judge
from lorakeet.formats.detect import read_adapter
from lorakeet.models.frozen import frozen_digests
from lorakeet.models.image import ImageModel, load_image_model, put_image_adapter
from lorakeet.models.image_sample import Sampler, draw_latents
from lorakeet.models.inject import activate
from lorakeet.models.spec import ModelSpec
from lorakeet.workflows.certify_run import check_frozen

STEPS = 4  # of the sampler: enough for a difference to grow, few enough to be quick
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest latent


def image_digests(model: ImageModel) -> dict[str, str]:
    """The digest of every frozen number of UNet, text encoders and autoencoder."""
    return {**frozen_digests(model.parts), **frozen_digests(nn.ModuleDict({"vae": model.vae}))}


def certify_images(
    live: ImageModel, adapter: Path, prompts: Sequence[str], *, before: Mapping[str, str], spec: ModelSpec, guidance: float,
    name: str = "default",
) -> Certificate:  # fmt: skip
    """The three checks of the table above; `before` are the digests that `image_digests` gave before training."""
    fresh = load_image_model(spec, say=lambda _: None)
    put_image_adapter(fresh, read_adapter(adapter), name)
    sampler = Sampler(steps=STEPS, guidance=guidance)
    checks = []
    for check, active, between in (
        ("adapter on disk", name, ("live adapter", f"{adapter.name}/ on the base, both read again")),
        ("base untouched", None, ("base with the adapter off", "base read again")),
    ):
        drawn = []
        for model in (live, fresh):
            activate(model.parts, active)
            drawn.append(draw_latents(model, prompts, list(range(len(prompts))), sampler))
        checks.append(latent_check(check, *drawn, between=between, dtype=live.dtype))
    activate(live.parts, name)
    checks.append(check_frozen(before, image_digests(live)))
    facts = {"model": live.name, "dtype": str(live.dtype).removeprefix("torch."), "sampler steps": str(STEPS)}
    return Certificate(f"The adapter {adapter}", tuple(checks), facts)


def latent_check(name: str, left: Tensor, right: Tensor, *, between: tuple[str, str], dtype: torch.dtype) -> Check:
    """Whether two sets of latents (n, channels, h, w) agree: the largest difference, as a share of the largest latent."""
    largest = float(left.abs().max())
    apart = float((left - right).abs().max()) / max(largest, torch.finfo(torch.float32).tiny)
    found = judge(name, {"latent": apart}, tolerance={"latent": TOLERANCE[dtype]}, between=between, n=len(left))
    return replace(found, passed=found.passed and bool(torch.isfinite(left).all()))
