"""The settings of diffusion training and of the samples that a run draws. Imports no torch: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast


@dataclass(frozen=True)
class DiffusionSpec:
    """How noise is added, weighed and judged: the `diffusion` part of a run file, used with kind: image."""

    prediction: Literal["auto", "epsilon", "v_prediction", "flow"] = field(
        default="auto",
        metadata={"help": "What the model predicts, where its scheduler's configuration is wrong; auto takes its word."},
    )
    min_snr_gamma: float = field(
        default=0.0, metadata={"help": "Caps the weight of nearly clean examples (arXiv 2303.09556); 5 is usual, 0 is off."}
    )
    noise_offset: float = field(
        default=0.0, metadata={"help": "Share of noise that is one number for a whole channel: for dark or bright pictures."}
    )
    timesteps: Literal["auto", "uniform", "logit-normal", "mode", "cosmap"] = field(
        default="auto",
        metadata={"help": "Which timesteps are trained: all alike or some more often; auto is logit-normal for a flow."},
    )
    prior_weight: float = field(
        default=1.0, metadata={"help": "Weight of the pictures of the subject's kind (images.prior) against the subject's own."}
    )
    text_encoder: bool = field(
        default=False, metadata={"help": "Adapt the text encoders as well; then captions are encoded in every step."}
    )
    checkpointing: bool = field(
        default=False, metadata={"help": "Compute the UNet's activations twice instead of keeping them: less memory, more time."}
    )
    at_once: int = field(
        default=4, metadata={"help": "Pictures that are computed together; the rows of a step are cut into such parts."}
    )
    held_out_timesteps: int = field(
        default=8, metadata={"help": "Fixed timesteps, with fixed noise, at which each held-out picture is judged."}
    )
    prompts: tuple[str, ...] = field(
        default=(), metadata={"help": "What the report's samples show; left out, the first three captions of judged pictures."}
    )
    seeds: int = field(default=1, metadata={"help": "Samples of each prompt and weight; 0 draws none."})
    progress: bool = field(
        default=False, metadata={"help": "Draw the prompts, at the same seeds, with every held-out evaluation: RUN/progress."}
    )
    sample_steps: int = field(default=30, metadata={"help": "Steps of the sampler for each sample."})
    guidance: float | None = field(
        default=None,
        metadata={
            "help": "How much further samples follow the prompt than without guidance; 1 is off. Left out: SD 1.x and 2.x 7.5, "
            "SDXL 5, SD3 7, FLUX 3.5."
        },
    )

    scorer: str = field(
        default="",
        metadata={
            "help": "CLIP model (folder or hub id) that compares samples with prompts and judged pictures; left out, none does."
        },
    )

    def resolved(self, predicted: str, guidance: float) -> DiffusionSpec:
        """These settings with what `auto` means for a model that predicts `predicted`, and with `guidance` where none is said."""
        strength = guidance if self.guidance is None else self.guidance
        timesteps = ("logit-normal" if predicted == "flow" else "uniform") if self.timesteps == "auto" else self.timesteps
        return replace(self, prediction=cast(Any, predicted), timesteps=cast(Any, timesteps), guidance=strength)

    def why_not(self, predicted: str) -> list[str]:
        """What of these settings does not go with a model that predicts `predicted`."""
        found: list[str] = []
        if self.prediction not in ("auto", predicted):
            found.append(f"diffusion.prediction is {self.prediction}, but the model was loaded to predict {predicted}; use auto.")
        if self.min_snr_gamma and predicted == "flow":
            found.append(
                f"diffusion.min_snr_gamma is {self.min_snr_gamma:g}, but the model predicts a flow, whose timesteps are weighed "
                "by how often they are drawn; leave it out and use diffusion.timesteps."
            )
        return found

    def validate(self) -> list[str]:
        """Every problem of these settings in words; empty when they can be used."""
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
