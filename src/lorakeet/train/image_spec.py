"""`DiffusionSpec`, the `diffusion` part of a run file: training on noise, and samples. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from lorakeet.setting import setting


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
