"""The certificate of an image run: the adapter on disk draws what was trained, and the base has not changed.

frozen weights   the digest of every frozen number, before training and after it
adapter on disk  the pipeline loaded once more with the adapter read from disk, against the live one: latents of samples; their
                 difference is also a small share of the adapter's effect, so that no weak adapter is mistaken for another
base untouched   the pipeline loaded once more, against the live one with its adapter off: latents of samples
trained = saved = loaded  the tensors of the adapter, by name and to the bit: live, in the file, and on the model that loaded it

Both sides do the same arithmetic in the same dtype, so the tolerance of fp32 applies to every dtype, as in certify_text. But
CUDA's libraries choose kernels by alignment and workspace, so they may round differently from one time to the next. That is
measured: the live adapter draws twice, and if the base read again equals the live one to the bit, the difference of their latents
is rounding too. Tolerances are at least four times the larger of the two (`latent_check`).

With a memory budget, which fits one base only, the adapter from disk is added to the live base, and the last check is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakeet.evaluate.certificate import Certificate, Check, Unchecked, tolerance_check
from lorakeet.formats.detect import read_adapter
from lorakeet.kinds.certify_pairs import check_frozen, check_saved
from lorakeet.kinds.images.model.model import ImageModel, load_image_model, put_image_adapter, with_model_paths
from lorakeet.kinds.images.model.sample import Sampler, draw_latents
from lorakeet.models.compare_saved import compare_saved
from lorakeet.models.inject import activate, eject
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.digests import frozen_digests

_READ = "read-from-disk"
STEPS = 4  # of the sampler: enough for a difference to grow, few enough to be quick
TOLERANCE = 1e-4  # of the largest latent
AT_MOST = 2e-2  # of the largest latent, however much the machine rounds
OF_EFFECT = 0.01  # of the largest difference that the adapter makes
FLOORS = 4  # times the measured rounding, since two drawings show less than its maximum
_TINY = torch.finfo(torch.float32).tiny


def frozen_image_digests(model: ImageModel) -> dict[str, str]:
    """The digest of every frozen number of UNet, text encoders and autoencoder."""
    return {**frozen_digests(model.parts), **frozen_digests(nn.ModuleDict({"vae": model.vae}))}


def certify_images(
    live: ImageModel, adapter: Path, prompts: Sequence[str], *, before: Mapping[str, str], spec: ModelSpec | None,
    sampler: Sampler, name: str = "default",
) -> Certificate:  # fmt: skip
    """The checks of the table above; `before` is `frozen_image_digests` before training.

    `spec` says how to load the pipeline again; None if memory fits one only.
    """
    sampler = replace(sampler, steps=STEPS)

    def drawn(model: ImageModel, active: str | None) -> Tensor:
        activate(model.parts, active)
        return draw_latents(model, prompts, list(range(len(prompts))), sampler)

    wanted, base = drawn(live, name), drawn(live, None)
    live.stage()
    fresh = live if spec is None else load_image_model(spec, prediction=live.prediction, say=lambda _: None)
    held = read_adapter(adapter)
    put_image_adapter(fresh, held, _READ)
    pairs = compare_saved((live.parts, name), with_model_paths(fresh, held), (fresh.parts, _READ))
    read = drawn(fresh, _READ)
    other = base if spec is None else drawn(fresh, None)
    if spec is None:
        eject(live.parts, _READ)
    fresh.stage()
    floor = _largest(drawn(live, name) - wanted)
    after = frozen_image_digests(live)
    if spec is not None and frozen_image_digests(fresh) == after:
        floor = max(floor, _largest(other - base))
    again = "on the same base" if spec is None else "on the base, both read again"
    between = ("live adapter", f"{adapter.name}/ {again}")
    checks = [latent_check("adapter on disk", wanted, read, between=between, base=base, floor=floor)]
    if spec is not None:
        between = ("base with the adapter off", "base read again")
        checks.append(latent_check("base untouched", base, other, between=between, floor=floor))
    checks += [check_frozen(before, after), check_saved(pairs, adapter.name)]
    moved = "none: the samples equal the base's, as they would with any adapter without effect"
    if effect := _largest(wanted - base):
        moved = f"up to {effect / max(_largest(base), _TINY):.2g} of the base's largest latent"
    rounding = "none: the same samples drawn again are the same to the bit"
    if floor:
        share = floor / max(_largest(wanted), _TINY)
        rounding = f"up to {share:.2g} of the largest latent between two drawings of the same samples"
    facts = {
        "model": live.name,
        "dtype": str(live.dtype).removeprefix("torch."),
        "sampler steps": str(STEPS),
        "adapter's effect": moved,
        "rounding": rounding,
        "in PEFT": "not compared: diffusers reads this adapter, one part of the pipeline at a time",
    }
    hidden = _hidden(floor, effect)
    unchecked = (Unchecked(f"{adapter.name}/", "the adapter's effect", hidden),) if hidden else ()
    return Certificate(f"The adapter {adapter}", tuple(checks), facts, unchecked)


def latent_check(
    name: str, left: Tensor, right: Tensor, *, between: tuple[str, str], base: Tensor | None = None, floor: float = 0.0
) -> Check:
    """The check that two sets of latents (n, channels, h, w) agree: the largest difference, as a share of the largest latent.

    With `base`, the latents without the adapter, also as a share of the adapter's largest effect. An adapter without effect only
    agrees with another one without effect. `floor` is the largest measured difference by rounding: 4·floor is allowed, up to 2e-2
    of the largest latent. If `floor` is more than 1 % of the adapter's effect, that share is not measured, and `detail` says so.
    """
    differ, largest = _largest(left - right), max(_largest(left), _TINY)
    measured, tolerance = {"latent": differ / largest}, {"latent": max(TOLERANCE, min(FLOORS * floor / largest, AT_MOST))}
    detail = ""
    if base is not None:
        effect = _largest(left - base)
        hidden = _hidden(floor, effect)
        detail = "" if effect else "The live adapter changes no latent of these prompts."
        if hidden:
            detail = f"The adapter's effect is not checked: {hidden}."
        else:
            measured["of_effect"] = differ / effect if effect else (0.0 if differ == 0 else float("inf"))
            tolerance["of_effect"] = max(OF_EFFECT, FLOORS * floor / effect) if effect else OF_EFFECT
    found = tolerance_check(name, measured, tolerance=tolerance, between=between, n=len(left), detail=detail)
    return replace(found, passed=found.passed and bool(torch.isfinite(left).all()))


def _hidden(floor: float, effect: float) -> str:
    """Why the adapter's effect on latents cannot be distinguished from rounding; empty if it can."""
    if not floor > OF_EFFECT * effect:
        return ""
    return f"rounding changes latents by up to {floor:.2g}, and the adapter by {effect:.2g}, too little to distinguish"


def _largest(latents: Tensor) -> float:
    return float(latents.abs().max())
