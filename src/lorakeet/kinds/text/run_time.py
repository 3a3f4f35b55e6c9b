"""Estimates how long a run on text takes on this machine, before it trains: from the tokens of each phase, and measured rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lorakeet.data.chat import Encoded
from lorakeet.data.few_shot import SHARE, widest
from lorakeet.data.prefix import PASS, common_prefix
from lorakeet.evaluate.wording import as_written, duration_text
from lorakeet.kinds.text.assemble import TextAssembly
from lorakeet.kinds.text.certify import CHECK_TOKENS
from lorakeet.kinds.text.evaluate import CALIBRATION_ROWS
from lorakeet.kinds.text.reply import LEAST_TOKENS, LONGER
from lorakeet.memory.ledger import Work
from lorakeet.models.generate.sample import ROWS_AT_ONCE
from lorakeet.models.generate.score import label_branches, label_endings
from lorakeet.planning.evaluation_batches import tokens_within_peak
from lorakeet.planning.forecast_text_run import REPLY_TOKENS
from lorakeet.registry import START

PROBE_SIZE, PROBE_BYTES, PROBE_REPEATS = 1024, 64 << 20, 5
FORWARD = 0.5  # of a training pass: without gradients
CHECKS = 6  # passes of a certificate over its tokens: two adapters, two bases, and PEFT's comparison
SYSTEMS = 3  # adapter, base and few-shot base
MUCH = 0.25  # of the run, from which the few-shot base is named


@dataclass(frozen=True)
class Speed:
    """The highest measured rates of this machine: FLOPs per second in matrix products, and bytes written per second."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """The time of some work at these rates."""
        return max(work.flops / self.flops, work.written / self.bytes)


@dataclass(frozen=True)
class PhaseTokens:
    """What the phases of a run compute, in tokens of a forward pass without gradients; the fixed cost of a pass is in it."""

    training: float
    evaluation: float
    certificate: float
    replies: float = 0  # of the evaluation
    prompts: int = 0  # that are answered
    few_shot: float = 0  # of the evaluation: the few-shot base on labelled rows


def measured_speed(products: torch.dtype) -> Speed:
    """The best of a few square products and of a few copies, which take about a tenth of a second."""
    square = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=products)
    source = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(_timed(lambda: torch.mm(square, square)) for _ in range(PROBE_REPEATS))
    copy = min(_timed(lambda: target.copy_(source)) for _ in range(PROBE_REPEATS))
    return Speed(2 * PROBE_SIZE**3 / product, PROBE_BYTES / copy)


def phase_tokens(setup: TextAssembly) -> PhaseTokens:
    """The tokens of training with its held-out evaluations, of the evaluation, and of the certificate."""
    train, spec = setup.config.train, setup.config.evaluate
    each_epoch = math.ceil(len(setup.train.examples) / train.sequences)
    held_out = 1 + setup.steps // train.evaluation_interval(each_epoch)
    training = _steps(setup) + held_out * _read(setup.held_out, train.micro_tokens) + _reference(setup)
    part, _ = setup.evaluated
    rows, compares, trained = setup.encoded[part], bool(train.registered.compared_with(train)), train.registered
    prompts, replies, few_shot = 0, 0.0, 0.0
    if setup.dataset.labels:
        answering, few_shot = _labelled(setup, rows)
        answering += few_shot
    else:
        answers = 1 - trained.only_read / trained.answers
        prompts = min(spec.answers, sum(row.answered and row.desirable is not False for row in setup.evaluated[1]))
        replies = _written(setup, rows, prompts) if prompts else 0
        answering = replies + (2 + compares) * answers * _read(rows, train.micro_tokens)
    drift = (spec.drift_tokens * (PASS + spec.drift_texts) + 2 * spec.drift_texts * spec.drift_tokens) * bool(spec.drift_texts)
    again = _read(setup.held_out, train.micro_tokens) if compares else 0  # the reference, as it was before training
    certificate = CHECKS * (CHECK_TOKENS + PASS) + again
    return PhaseTokens(training, answering + drift, certificate, replies, prompts, few_shot)


def run_time_text(setup: TextAssembly) -> str:
    """The time of the run in a sentence; empty on a device whose speed is not measured, or where nothing was planned."""
    plan = setup.residency.plan
    if plan is None or setup.device.type != "cpu" or setup.residency.way.streamed:
        return ""
    micro_batch = measured_speed(setup.text.products).seconds(plan.work)
    token, tokens = FORWARD * micro_batch / plan.rows.tokens, phase_tokens(setup)
    phases = {"training": tokens.training, "evaluation": tokens.evaluation, "certificate": tokens.certificate}
    each = ", ".join(f"{name} {duration_text(token * count)}" for name, count in phases.items())
    whole = duration_text(sum(as_written(token * count) for count in phases.values()))
    said = f"Time here, as busy as this machine is now: about {whole} ({each}), give or take half."
    if tokens.few_shot >= MUCH * sum(phases.values()):
        part = duration_text(token * tokens.few_shot)
        return f"{said} Of the evaluation, {part} is the few-shot base, which --evaluate.examples 0 leaves out."
    if not tokens.prompts:
        return said
    return (
        f"{said} Of the evaluation, {duration_text(token * tokens.replies)} are replies: {tokens.prompts} held-out prompts "
        "(evaluate.answers), answered by adapter, base and few-shot base."
    )


def _steps(setup: TextAssembly) -> float:
    """The tokens of all steps. Answers that are only read are so in a pass of their own."""
    trained = setup.config.train.registered
    read = setup.tokens_of_run * trained.only_read / trained.answers
    return (setup.tokens_of_run - read) / FORWARD + read + setup.steps * PASS * bool(read)


def _reference(setup: TextAssembly) -> float:
    """The tokens of the reference: all answers once; where it is the base, its held-out answers with the adapter off too."""
    train = setup.config.train
    if not (reference := train.registered.compared_with(train)):
        return 0
    twice = 2 if reference == START and setup.config.lora.earlier is None else 1
    return _read(setup.train, train.micro_tokens) + twice * _read(setup.held_out, train.micro_tokens)


def _read(rows: Encoded, micro_tokens: int) -> float:
    """The tokens of reading all rows once."""
    tokens = sum(len(example.ids) for example in rows.examples)
    return tokens + PASS * math.ceil(tokens / micro_tokens)


def _labelled(setup: TextAssembly, rows: Encoded) -> tuple[float, float]:
    """The tokens of base and adapter on labelled rows, and of the few-shot base.

    Labels of several tokens repeat a row, or are its batch.
    """
    count, typical = len(rows.examples), _typical(rows)
    first = setup.encoder.candidates(setup.dataset.train[0])
    endings = [] if first is None else label_endings(setup.text, first)
    several = any(len(ending) > 1 for ending in endings)
    own = (typical - _beginning(setup.train)) * max(1, len(label_branches(endings)))

    def answered(number: int, shown: float, most: int) -> float:
        together = number * own + math.ceil(number * own / max(own, most - shown)) * (shown + PASS)
        return min(together, number * (shown + typical + PASS))

    micro, longest = setup.config.train.micro_tokens, setup.config.data.max_tokens
    width = longest if several or setup.config.memory.limit else widest(longest, setup.text.context)
    limit = SHARE * longest if width == longest else width - longest
    shown = min(setup.config.evaluate.examples, limit // typical) * typical
    found = 2 * answered(count, 0, micro)
    if not shown:
        return found, 0.0
    known = min(CALIBRATION_ROWS, len(setup.train.examples))
    return found, answered(count + known, shown, tokens_within_peak(setup.residency, max(micro, width), setup.device))


def _written(setup: TextAssembly, rows: Encoded, prompts: int) -> float:
    """The tokens of the replies of base, adapter and few-shot base to so many prompts."""
    spec, typical = setup.config.evaluate, _typical(rows)
    longest = LONGER * max(int(row.supervised.sum()) for row in rows.examples)
    written = min(spec.answer_tokens, max(LEAST_TOKENS, longest))
    most = tokens_within_peak(setup.residency, max(setup.config.train.micro_tokens, REPLY_TOKENS), setup.device)
    passes = math.ceil(prompts / min(ROWS_AT_ONCE, max(1, most // (typical + written))))
    return SYSTEMS * (prompts * (typical + written) + passes * written * PASS) + passes * spec.examples * typical


def _typical(rows: Encoded) -> float:
    """The mean number of tokens of a row."""
    return sum(len(example.ids) for example in rows.examples) / max(1, len(rows.examples))


def _beginning(rows: Encoded) -> int:
    """The tokens that the first row and the last one begin with, as all of one template do."""
    return common_prefix(rows.examples[0].ids, rows.examples[-1].ids)


def _timed(work: Callable[[], Any]) -> float:
    """The seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
