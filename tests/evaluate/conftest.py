"""Answers and losses that look like a real run's, made from a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lorakeet.evaluate.answers import Answers, answers_from_probabilities
from lorakeet.evaluate.baselines import majority_class
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.intervals import mean
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.charts import ChartPoint, Curves
from lorakeet.evaluate.report.compose import classification_report, language_report
from lorakeet.evaluate.report.report import Command, Drift, Leak, MemoryUse, Report
from lorakeet.evaluate.spec import EvaluateSpec

LABELS = ("negative", "neutral", "positive")
WORDS = (
    "I have taken this for two months and the pain is nearly gone.",
    "It made me so tired that I could hardly work, and I gained weight.",
    "No side effects so far, but I can't say that it helps either.",
    "My doctor raised the dose after a week and then the headaches began.",
    "I would recommend it to anyone who has tried everything else.",
    "The first night I slept through, the second I was awake until four.",
)
QUICK = EvaluateSpec(resamples=400, show_rows=24)


def noisy_answers(system: str, truth: np.ndarray, *, skill: float, sharpness: float = 1.0, seed: int) -> Answers:
    """Answers whose logits are noise plus `skill` at the true label and a pull towards the most frequent one."""
    logits = np.random.default_rng(seed).normal(size=(len(truth), 3))
    logits[np.arange(len(truth)), truth] += skill
    logits[:, 2] += 0.7
    scaled = np.exp(sharpness * logits)
    return answers_from_probabilities(system, scaled / scaled.sum(axis=1, keepdims=True), labels=LABELS, truth=truth)


def example_truth(n: int = 379) -> np.ndarray:
    return np.random.default_rng(3).choice(3, p=[0.25, 0.1, 0.65], size=n)


def example_curves() -> Curves:
    generator = np.random.default_rng(6)
    steps = np.arange(1, 77)
    train = 1.15 * np.exp(-steps / 18) + 0.32 + generator.normal(size=len(steps)) * 0.06
    held = [(step, 0.52 + 0.6 * np.exp(-step / 12) + 0.0022 * max(0, step - 46)) for step in range(0, 77, 8)]
    return Curves(
        train=tuple(ChartPoint(int(step), float(value)) for step, value in zip(steps, train, strict=True)),
        held_out=tuple(ChartPoint(step, value, value - 0.05, value + 0.06) for step, value in held),
        learning_rate=tuple(ChartPoint(int(step), float(1e-3 * min(step / 4, (77 - step) / 73))) for step in steps),
        best_step=48,
        ended="Stopped after 3 evaluations without improvement",
    )


def example_certificate() -> Certificate:
    generator = np.random.default_rng(7)
    measured = {"logit": 2.0e-5, "mean_kl": 1.4e-11, "top1_agreement": 1.0, "non_finite": 0.0, "loss": 2.4e-7}
    allowed = {"logit": 1e-4, "mean_kl": 1e-8, "top1_agreement": 0.999, "non_finite": 0.0, "loss": 1e-5}
    check = tolerance_check(
        "Merged model in fp32",
        measured,
        tolerance=allowed,
        between=("live adapter", "merged"),
        floors=("top1_agreement",),
        n=2049,
    )
    check = replace(check, estimates={"mean_kl": mean(np.full(40, 1.4e-11) * generator.random(40), spec=QUICK)})
    return Certificate("the merged model equals the trained adapter", (check,), {"precision": "fp32", "tokens": "2,049"})


def example_report() -> Report:
    truth = example_truth()
    generator = np.random.default_rng(5)
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(2, 11))) for _ in truth]
    names = [LABELS[index] for index in truth]
    report = classification_report(
        "Drug reviews",
        adapter=noisy_answers("adapter", truth, skill=2.4, sharpness=1.5, seed=1),
        base=noisy_answers("base", truth, skill=0.9, sharpness=0.6, seed=2),
        floors=(
            majority_class(names, names, labels=LABELS),
            noisy_answers("TF-IDF + logistic regression", truth, skill=1.8, seed=4),
        ),
        texts=texts,
        sources=[f"drugsComTest.tsv:{row + 2}" for row in range(len(texts))],
        spec=QUICK,
    )
    return replace(
        report,
        subtitle="SmolLM2-135M-Instruct, rank 8 on all linear layers",
        created="held-out file drugsComTest.tsv",
        curves=example_curves(),
        leaks=(Leak("drugsComTest.tsv:118", "drugsComTrain.tsv:402", 1.0, "dropped from training", WORDS[0]),),
        drift=Drift(mean(generator.exponential(0.05, size=64), spec=QUICK), 64, "Texts that the base sampled."),
        memory=(MemoryUse("peak of the process", 1_900_000_000, 1_720_000_000), MemoryUse("weights", 269_000_000, 269_000_000)),
        memory_budget=4_000_000_000,
        speed={"training": "498 tokens/s", "time": "8 min 12 s", "steps": "76", "tokens seen": "221,400"},
        certificate=example_certificate(),
        facts={
            "model": "SmolLM2-135M-Instruct",
            "data": "drugsComTrain.tsv, 599 rows",
            "seed": "0",
            "machine": "2 cores, AVX-512",
        },
        next_commands=(
            Command("lorakeet merge runs/drug-reviews --out merged", "Fold the adapter into its base and verify the result."),
            Command("lorakeet evaluate runs/drug-reviews --data more.tsv", "Measure the adapter on rows of your own."),
        ),
    )


@pytest.fixture(scope="session")
def report() -> Report:
    return example_report()


@pytest.fixture(scope="session")
def language() -> Report:
    generator = np.random.default_rng(8)
    tokens = generator.integers(20, 200, size=120)
    losses = tokens * generator.normal(2.4, 0.3, size=120)
    better = losses - tokens * generator.normal(0.22, 0.1, size=120)
    return language_report(
        "Support chats",
        adapter=RowLosses("adapter", better, tokens),
        base=RowLosses("base", losses, tokens),
        texts=[WORDS[index % 6] for index in range(120)],
        truths=[WORDS[(index + 1) % 6] for index in range(120)],
        spec=QUICK,
    )
