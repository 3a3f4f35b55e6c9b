"""The certificate of a run on images: what is on disk draws what was trained, on a base that training left as it was.

frozen weights   the digest of every frozen number, before training and after it
adapter on disk  the pipeline loaded once more with the adapter read from disk, against the live one: latents of samples
base untouched   the pipeline loaded once more, against the live one with its adapter off: latents of samples

Under a memory budget, which has room for one base, the adapter from disk is put on the live one and the last check is left out.
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
from lorakeet.models.inject import activate, eject
from lorakeet.models.spec import ModelSpec
from lorakeet.workflows.certify_run import check_frozen

_READ = "read-from-disk"
STEPS = 4  # of the sampler: enough for a difference to grow, few enough to be quick
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest latent


def image_digests(model: ImageModel) -> dict[str, str]:
    """The digest of every frozen number of UNet, text encoders and autoencoder."""
    return {**frozen_digests(model.parts), **frozen_digests(nn.ModuleDict({"vae": model.vae}))}


def certify_images(
    live: ImageModel, adapter: Path, prompts: Sequence[str], *, before: Mapping[str, str], spec: ModelSpec | None,
    sampler: Sampler, name: str = "default",
) -> Certificate:  # fmt: skip
    """The checks of the table above; `before` are the digests that `image_digests` gave before training.

    `spec` says how the pipeline is loaded once more, and None that there is room for one only.
    """
    sampler = replace(sampler, steps=STEPS)

    def drawn(model: ImageModel, active: str | None) -> Tensor:
        activate(model.parts, active)
        return draw_latents(model, prompts, list(range(len(prompts))), sampler)

    wanted, base = drawn(live, name), drawn(live, None)
    live.stage()
    fresh = live if spec is None else load_image_model(spec, say=lambda _: None)
    put_image_adapter(fresh, read_adapter(adapter), _READ)
    again = "on the same base" if spec is None else "on the base, both read again"
    between = ("live adapter", f"{adapter.name}/ {again}")
    checks = [latent_check("adapter on disk", wanted, drawn(fresh, _READ), between=between, dtype=live.dtype)]
    if spec is None:
        eject(live.parts, _READ)
    else:
        between = ("base with the adapter off", "base read again")
        checks.append(latent_check("base untouched", base, drawn(fresh, None), between=between, dtype=live.dtype))
    fresh.stage()
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
