"""`EvaluateSpec`, the `evaluate` part of a run file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorakeet.errors import Problems
from lorakeet.setting import setting
from lorakeet.settings import require_types

LEAST_ANSWERS = 64  # prompts that are answered however long it takes, where there are as many: fewer show little

@dataclass(frozen=True)
class EvaluateSpec:
    """Settings of intervals, calibration, baselines, drift and report."""

    confidence: float = setting(0.95, "Confidence level of the intervals; 0.95 gives 95 % intervals.")
    resamples: int = setting(10_000, "Bootstrap and randomisation draws of every interval and test.")
    seed: int = setting(0, "Random seed of resampling, drift texts and the rows shown.")
    calibration_bins: int = setting(10, "Bins of the calibration error and of the reliability plot, with equally many rows each.")
    baselines: bool = setting(
        True, "Also evaluate simple baselines: TF-IDF + logistic regression, majority class, copied answers."
    )
    encoder: str | None = setting(
        None, "Folder of a text encoder, whose embeddings are a baseline of labelled rows where cross-validation prefers them."
    )
    examples: int = setting(
        8, "Training rows shown to the few-shot base, at least one a label, as many as fit (how-to/read-the-report); 0 for none."
    )
    reuse: bool = setting(
        True, "Take the base's answers from an earlier evaluation of the same model on the same rows; some are computed again."
    )
    answers: int = setting(
        LEAST_ANSWERS, "Held-out prompts that every system answers in words, for rows without labels; 0 for none."
    )
    answer_tokens: int = setting(256, "Most tokens of such a reply.")
    answer_seconds: int = setting(600, f"Seconds after which the adapter answers no prompts beyond the first {LEAST_ANSWERS}.")
    metric: str | None = setting(
        None, "Own metric of replies: a Python file and its function(reply, reference), such as my.py:score."
    )
    scale: tuple[str, ...] = setting(
        (), "Labels or answers in their order, lowest first, such as [low, medium, high]: their distance is measured too."
    )
    judge: str | None = setting(
        None, "Model behind OpenAI's API that compares the replies, URL#MODEL; it gets prompts, references and replies."
    )
    drift_texts: int = setting(
        64, "Number of texts, sampled from the base, on which the adapter's drift is measured; 0 for none."
    )
    drift_tokens: int = setting(32, "Tokens per drift text.")
    show_rows: int = setting(40, "Held-out rows shown side by side in the report.")

    def __post_init__(self) -> None:
        require_types(self)

    def validate(self) -> None:
        """Raises ConfigError that lists every setting out of its range."""
        problems = Problems("The evaluation settings cannot be used")
        if not 0.5 <= self.confidence < 1:
            problems.add(f"evaluate.confidence is {self.confidence}; expected 0.5 or more and less than 1. Use 0.95.")
        least = {"resamples": 100, "calibration_bins": 2, "drift_texts": 0, "drift_tokens": 1, "show_rows": 0, "seed": 0}
        least |= {"examples": 0, "answers": 0, "answer_tokens": 1, "answer_seconds": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                problems.add(f"evaluate.{name} is {getattr(self, name)}; expected {low} or more.")
        if self.scale and (len(self.scale) < 3 or len(set(self.scale)) < len(self.scale)):
            problems.add(f"evaluate.scale is {list(self.scale)}; expected 3 different labels or more, in their order.")
        if self.judge is not None and not re.fullmatch(r"https?://[^#@\s]+#\S+", self.judge):
            problems.add(f"evaluate.judge is {self.judge!r}; expected the address and the model, as in http://localhost:8000#qwen3.")
        problems.raise_if_any()
