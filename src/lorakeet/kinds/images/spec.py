"""`ImageSpec` and `DiffusionSpec`, what runs on images have in a run file. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from lorakeet.setting import setting

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of files of pictures


@dataclass(frozen=True)
class ImageSpec:
    """How pictures become training examples, in a run with kind: image."""

    resolution: int | None = setting(None, "Side of a square example in pixels; by default the model's own.")
    buckets: bool = setting(True, "Bucket pictures by aspect ratio; if false, every example is a square.")
    bucket_step: int | None = setting(
        None, "Sides of examples are multiples of this many pixels; by default what the model requires."
    )
    crops: int = setting(1, "Crops per picture: the first from its centre, the others at positions drawn once.")
    flip: bool = setting(False, "Also train on mirrored pictures; not for text, faces or anything one-sided.")
    caption: str = setting("", "Caption of pictures without their own, such as 'a photo of sks dog'.")
    caption_dropout: float = setting(0.1, "Share of training examples without caption, as classifier-free guidance requires.")
    prior: str = setting("", "Folder of pictures of the subject's class, trained on as well so that the class is preserved.")
    prior_caption: str = setting(
        "", "Caption of the class pictures, such as 'a photo of a dog'; without a folder the base generates them."
    )
    prior_count: int = setting(100, "Number of class pictures that the base generates.")
    smallest: int = setting(32, "Leave out pictures with a side below this many pixels; 0 keeps all.")
    near_duplicates: int = setting(
        8, "Bits of a 256-bit hash in which a copy may differ, before pixels are compared; 0 finds equal ones only."
    )
    cache: str = setting("", "Folder for cached latents and text embeddings; by default the user's cache folder.")

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        found: list[str] = []
        for name, least in (("resolution", 8), ("bucket_step", 1), ("crops", 1), ("smallest", 0), ("near_duplicates", 0),
                            ("prior_count", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"images.{name} is {value}; it must be {least} or more.")
        if self.near_duplicates > 64:
            bits = self.near_duplicates
            found.append(f"images.near_duplicates is {bits} of 256 bits; above 64 most pictures count as duplicates. Use 8.")
        if not 0 <= self.caption_dropout < 1:
            found.append(f"images.caption_dropout is {self.caption_dropout:g}; it must be at least 0 and below 1, such as 0.1.")
        return found


@dataclass(frozen=True)
class DiffusionSpec:
    """Noise, loss weights, evaluation and samples of a run with kind: image."""

    prediction: Literal["auto", "epsilon", "v_prediction", "flow"] = setting(
        "auto", "Prediction type of the model; auto uses that of its scheduler's configuration."
    )
    min_snr_gamma: float = setting(0.0, "Min-SNR loss weighting (arXiv 2303.09556); 5 is usual, 0 turns it off.")
    noise_offset: float = setting(0.0, "Share of noise that is constant per channel, for dark or bright pictures.")
    timesteps: Literal["auto", "uniform", "logit-normal", "mode", "cosmap"] = setting(
        "auto", "Distribution of the training timesteps; auto is logit-normal for flow models and uniform for others."
    )
    prior_weight: float = setting(1.0, "Weight of the prior-preservation loss (images.prior) relative to the subject's own.")
    text_encoder: bool = setting(False, "Adapt the text encoders as well; captions are then encoded at every step.")
    checkpointing: bool = setting(False, "Gradient checkpointing of the UNet: less memory, more time.")
    at_once: int = setting(4, "Pictures per micro-batch; the rows of a step are split into micro-batches.")
    held_out_timesteps: int = setting(
        8, "Number of fixed timesteps, with fixed noise, at which each held-out picture is evaluated."
    )
    prompts: tuple[str, ...] = setting(
        (), "Prompts of the report's samples; by default the first three captions of the evaluated pictures."
    )
    seeds: int = setting(1, "Samples per prompt and adapter weight; 0 draws none.")
    progress: bool = setting(False, "Draw the prompts, with fixed seeds, at every held-out evaluation, in RUN/progress.")
    sample_steps: int = setting(30, "Sampling steps per sample.")
    guidance: float | None = setting(
        None, "Classifier-free guidance scale, 1 is off; default: SD 1.x and 2.x 7.5, SDXL 5, SD3 7, FLUX 3.5."
    )

    scorer: str = setting(
        "", "CLIP model (folder or hub id) that compares samples with prompts and evaluated pictures; by default none."
    )

    def resolved(self, predicted: str, guidance: float) -> DiffusionSpec:
        """Returns these settings with `auto` resolved for a model that predicts `predicted`, and `guidance` as default."""
        strength = guidance if self.guidance is None else self.guidance
        timesteps = ("logit-normal" if predicted == "flow" else "uniform") if self.timesteps == "auto" else self.timesteps
        return replace(self, prediction=cast(Any, predicted), timesteps=cast(Any, timesteps), guidance=strength)

    def why_not(self, predicted: str) -> list[str]:
        """Returns a message for every setting that does not suit a model that predicts `predicted`."""
        found: list[str] = []
        if self.prediction not in ("auto", predicted):
            found.append(f"diffusion.prediction is {self.prediction}, but the model was loaded to predict {predicted}; use auto.")
        if self.min_snr_gamma and predicted == "flow":
            found.append(
                f"diffusion.min_snr_gamma is {self.min_snr_gamma:g}, but the model predicts a flow, whose timesteps are "
                "weighted by how often they are drawn; leave it out and use diffusion.timesteps."
            )
        return found

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        found: list[str] = []
        for name, least in (("min_snr_gamma", 0), ("noise_offset", 0), ("prior_weight", 0),
                            ("at_once", 1), ("held_out_timesteps", 1), ("seeds", 0),
                            ("sample_steps", 1), ("guidance", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                found.append(f"diffusion.{name} is {value:g}; it must be {least} or more.")
        if self.progress and not self.seeds:
            found.append("diffusion.progress is true, but diffusion.seeds is 0, which draws nothing; set it to 1 or more.")
        return found


def images_of(config: Any) -> ImageSpec:
    """The part `images` of a RunConfig."""
    return cast(ImageSpec, config.section(ImageSpec))


def diffusion_of(config: Any) -> DiffusionSpec:
    """The part `diffusion` of a RunConfig."""
    return cast(DiffusionSpec, config.section(DiffusionSpec))
