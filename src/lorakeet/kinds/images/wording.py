"""The names of what is measured on images, and their words in a report. Imports no torch."""

from __future__ import annotations

from lorakeet.evaluate.wording import MetricWords

METRIC, PROMPT_DISTANCE, STYLE_DISTANCE = "denoising_loss", "prompt_distance", "style_distance"
METRICS = {
    METRIC: MetricWords("Denoising loss", "mean squared error", "Squared error of the predicted noise", False, 4),
    PROMPT_DISTANCE: MetricWords("Prompt distance", "prompt distance", "1 − CLIP cosine: sample, prompt", False, 4),
    STYLE_DISTANCE: MetricWords("Style distance", "style distance", "1 − CLIP cosine: sample, evaluation pictures", False, 4),
}
