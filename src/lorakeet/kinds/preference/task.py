"""The training task of preferences: pairs of answers, compared with the log-probabilities of a fixed reference.

    pairs ──► micro-batches with both answers ──► log p of each answer ──► loss of each pair (kinds/preference/loss)

The head's loss comes in chunks over the vocabulary, as for other text; a row's log-probabilities are summed in fp64, in an order
that does not depend on the micro-batch. The reference is computed once, before training (kinds/preference/reference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakeet.core.adapter import Adapter
from lorakeet.data.batches import StepOrder, distribute_rows
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches
from lorakeet.data.pairs import pair_batches
from lorakeet.data.prefix import BatchLimits
from lorakeet.errors import VerificationFailed
from lorakeet.kernels.host_copies import to_device, together_on
from lorakeet.kinds.preference.loss import PairScores, kto_losses, log_ratio_gap, preference_losses
from lorakeet.kinds.preference.measure import TIE
from lorakeet.kinds.preference.spec import KTO, PreferenceSpec
from lorakeet.models.generate.score import row_losses
from lorakeet.models.text.model import TextModel
from lorakeet.train.spec import TrainSpec
from lorakeet.train.task import HeldOut, Size
from lorakeet.train.text.loss import head_losses
from lorakeet.train.text.streamed_gradients import loss_gradients_by_block
from lorakeet.train.text.task import TextTask

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reference:
    """log p of each training and each held-out answer (answers,) by the reference, in the order of the examples.

    `micro_tokens` went through the model at once. `from_base` is the mean difference from the base with the adapter off, in nats
    a token; None where the reference is not the base. `adapter` is the reference as a value; None for the base. `fresh` if it was
    computed in this process, and not read.
    """

    train: Floats
    held_out: Floats
    micro_tokens: int
    from_base: float | None = None
    adapter: Adapter | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Preferred:
    """What the held-out pairs say: the share whose chosen answer gained more than the rejected one, where pairs within TIE of
    each other count half as in a report, and the mean lead in nats.
    """

    share: float
    lead: float
    chosen: float  # mean log-ratio of the chosen answers to the reference, in nats a token


@dataclass(frozen=True, eq=False)
class Preferences:
    """What training on pairs needs beside the rows: the resolved settings of the loss, the reference, and of each training and
    each held-out row of kto whether its answer is wanted. `start_within` as in PreferenceTask.
    """

    spec: PreferenceSpec
    reference: Reference | None = None
    desirable: tuple[Sequence[bool], Sequence[bool]] = ((), ())
    start_within: float | None = None

    def task(self, text: TextModel, train: Sequence[Example], **given: Any) -> PreferenceTask:
        """The task of these pairs."""
        found = PreferenceTask(text, train, preference=self.spec, desirable=self.desirable, **given)
        found.reference, found.start_within = self.reference, self.start_within
        return found


class PreferenceTask(TextTask):
    """Trains an adapter on pairs of answers: `train` and `held_out` are examples in pairs (data/pairs).

    `preference` is resolved. `reference` must be set before the first step, unless the objective has none. For kto the second
    answer of each pair is that of another row, which estimates the KL, and `desirable` says of each training and each held-out
    pair whether its first answer is wanted.
    """

    reference: Reference | None = None
    start_within: float | None = None  # nats a token by which the first step may differ from the reference, by rounding
    measured: Preferred | None = None  # at the latest held-out evaluation

    def __init__(
        self,
        text: TextModel,
        train: Sequence[Example],
        *,
        preference: PreferenceSpec,
        desirable: tuple[Sequence[bool], Sequence[bool]] = ((), ()),
        **given: Any,
    ) -> None:
        super().__init__(text, train, **given)
        self.preference, self.desirable = preference, tuple(np.array(flags, bool) for flags in desirable)
        self.train = [replace(example, key=str(number)) for number, example in enumerate(self.train)]
        self.order = order_of_pairs(self.train, self.spec)
        self.steps_per_epoch = self.order.steps_per_epoch
        self._kl, self._step = 0.0, 0

    @property
    def objective(self) -> str:
        return str(self.spec.objective)

    def batches(self, step: int) -> list[Batch]:
        self._step = step
        pairs = self._own_pairs(self.train, self.order.indices(step))
        if self.objective == KTO:
            return self.text.micro_batches([self.train[2 * pair] for pair in pairs], self.spec.micro_tokens)
        return self._cut([self.train[number] for pair in pairs for number in (2 * pair, 2 * pair + 1)])

    def step_rows(self, step: int) -> list[Example]:
        return [self.train[number] for pair in self.order.indices(step) for number in (2 * pair, 2 * pair + 1)]

    def joinable(self, step: int) -> list[Batch]:
        self._step = step
        rows, most = self.step_rows(step), self.spec.micro_tokens
        if self.objective == KTO:
            return micro_batches(rows[::2], most)
        return pair_batches(rows, BatchLimits(most, most, 0), shares=False)

    def _cut(self, examples: Sequence[Example]) -> list[Batch]:
        text = self.text
        limits = text.batch_limits([len(example.ids) for example in examples], self.spec.micro_tokens)
        return pair_batches(examples, limits, shares=text.options.share_prefix and not text.pads, padded=text.pads)

    def _own_pairs(self, examples: Sequence[Example], pairs: Sequence[int]) -> list[int]:
        """Those of `pairs` that this process computes."""
        if self.processes.count == 1:
            return list(pairs)
        lengths = _pair_lengths(examples)
        own = distribute_rows([lengths[pair] for pair in pairs], self.processes.count)[self.processes.rank]
        return [pairs[at] for at in own]

    def size(self, batch: Batch) -> Size:
        """Targets count pairs, or the answers of kto: each weighs the same, however long it is."""
        rows = len(batch.lengths)
        return Size(rows=rows, tokens=batch.tokens, targets=rows if self.objective == KTO else rows // 2)

    def gradients(self, batches: Sequence[Batch], targets: float) -> Tensor:
        self.begin_step(batches)
        streamed = self.text.streamed
        if streamed is None:
            return super().gradients(batches, targets)
        self.text.train()
        here = [batch.to(self.text.device) for batch in batches]

        def loss(number: int) -> tuple[Tensor, Tensor]:
            found = self._loss_of(batches[number], here[number])
            return found / targets, found.detach()

        return loss_gradients_by_block(self.text, streamed, here, loss, spill=self.spill, together=self.together)

    def begin_step(self, batches: Sequence[Batch]) -> None:
        if self.objective == KTO:
            self._kl = self._kl_of(self.train, [int(key) // 2 for batch in batches for key in batch.keys], self._reference.train)

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the loss over the batch's pairs, with gradient, in training mode."""
        self.text.train()
        return self._loss_of(batch, batch.to(self.text.device))

    def _loss_of(self, batch: Batch, here: Batch) -> Tensor:
        return self.loss_of(batch, head_losses(self.text, self.text.hidden(here), here.target_ids, chunk=self.spec.head_chunk))

    def loss_of(self, batch: Batch, losses: Tensor) -> Tensor:
        counts = np.bincount(batch.target_rows.cpu().numpy(), minlength=len(batch.lengths))
        sums = -torch.stack([part.double().sum() for part in losses.split(counts.tolist())])  # type: ignore[no-untyped-call]
        numbers = np.array([int(key) for key in batch.keys])
        read = [] if self.reference is None else [self.reference.train[numbers]]
        tokens, *others = together_on([counts.astype(np.float64), *read], sums.device)
        known = others[0] if others else None
        if known is not None and self.start_within is not None and self._step == 0:
            require_start(float(((sums.detach() - known).abs() / tokens).mean()), self.start_within)
        if self.objective == KTO and known is not None:
            wanted = to_device(torch.from_numpy(self.desirable[0][numbers // 2]), sums.device)
            return kto_losses(self.preference, sums, known, wanted, self._kl).sum()
        return preference_losses(
            self.objective, self.preference, pair_scores(sums, tokens), None if known is None else pair_scores(known, tokens)
        ).sum()

    @property
    def _reference(self) -> Reference:
        if self.reference is None:
            raise ValueError(f"{self.objective} compares with a reference, and none is set")
        return self.reference

    def _kl_of(self, examples: Sequence[Example], pairs: Sequence[int], reference: Floats) -> float:
        """KTO's estimate of KL(model ‖ reference): the mean log-ratio of answers to other prompts, at least 0."""
        rows = [2 * pair + 1 for pair in pairs]
        with self._passing():
            sums, _ = row_losses(
                self.text, [examples[row] for row in rows], micro_tokens=self.spec.micro_tokens, chunk=self.spec.head_chunk
            )
        found = torch.tensor([float((-sums - reference[rows]).sum()), float(len(rows))], dtype=torch.float64)
        total, count = self.processes.summed(found).tolist() if self.processes.count > 1 else found.tolist()
        return max(0.0, float(total) / max(float(count), 1.0))

    def held_out(self) -> HeldOut | None:
        """The loss of every held-out pair, each of weight 1."""
        if not self.held_out_rows:
            return None
        sums, tokens = self.log_probs(self.held_out_rows)
        known = None if self.reference is None else self.reference.held_out
        losses, self.measured = pair_losses(
            self.objective, self.preference, sums, known, tokens, desirable=self.desirable[1].tolist()
        )
        found = self.measured
        more = {} if found is None else {"preferred": found.share, "lead": found.lead, "chosen_change": found.chosen}
        return HeldOut(losses, np.ones_like(losses), more)

    def log_probs(self, rows: Sequence[Example]) -> tuple[Floats, Floats]:
        """log p of each answer (answers,) by the model as it is, equal in every process, and its tokens."""
        losses, tokens = self.losses_of(rows)
        return -losses, tokens

    def halve(self) -> str:
        shortest = min((len(row.ids) for row in self.train), default=0)
        tokens = self.spec.micro_tokens // 2
        if tokens < 2 * shortest:  # every pair is a micro-batch of its own already
            return ""
        return super().halve()

    @property
    def learning_rate(self) -> float:
        return self.spec.registered.rate_factor * super().learning_rate


def require_start(found: float, most: float) -> None:
    """Raises VerificationFailed if the first step is `found` nats a token from the reference: then its margins are not 0."""
    if not found <= most:
        raise VerificationFailed(
            f"In the first step the answers' log-probabilities differ from the reference by {found:.3g} nats a token, where "
            f"{most:g} is allowed: nothing is trained yet, so both should agree. Report the model and the settings."
        )


def pair_losses(
    objective: str,
    spec: PreferenceSpec,
    sums: Floats,
    reference: Floats | None,
    tokens: Floats,
    *,
    desirable: Sequence[bool] = (),
) -> tuple[Floats, Preferred | None]:
    """The loss of each pair (n,) from the log-probabilities (2n,) of answers in pairs, and what is preferred; None for kto."""
    policy, counts = torch.from_numpy(sums), torch.from_numpy(tokens)
    known = None if reference is None else torch.from_numpy(reference)
    if objective == KTO and known is not None:
        kl = max(0.0, float((policy - known)[1::2].mean()))
        flags = torch.from_numpy(np.asarray(desirable, bool))
        return kto_losses(spec, policy[::2], known[::2], flags, kl).numpy(), None
    own, fixed = pair_scores(policy, counts), None if known is None else pair_scores(known, counts)
    losses = preference_losses(objective, spec, own, fixed).numpy()
    if fixed is None:
        mine, other = own.means()
        return losses, Preferred(_share_of_pairs(mine - other), float((mine - other).mean()), float(mine.mean()))
    gap = log_ratio_gap(own, fixed, normalised=bool(spec.length_normalised))
    change = ((own.chosen - fixed.chosen) / own.chosen_tokens).mean()
    return losses, Preferred(_share_of_pairs(gap, TIE), float(gap.mean()), float(change))


def not_preferred(
    objective: str,
    spec: PreferenceSpec,
    sums: Floats,
    reference: Floats | None,
    tokens: Floats,
    *,
    desirable: Sequence[bool] = (),
) -> Floats:
    """1 for each pair (n,) whose rejected answer gained more, 0.5 where both gained equally, else 0; whatever β is.

    Of log-probabilities (2n,) as in `pair_losses`. For kto 1 for an answer on the wrong side of the estimated KL.
    """
    policy, counts = torch.from_numpy(sums), torch.from_numpy(tokens)
    known = None if reference is None else torch.from_numpy(reference)
    if objective == KTO and known is not None:
        change = policy - known
        gap = change[::2] - change[1::2].mean().clamp(min=0.0)
        gap = torch.where(torch.from_numpy(np.asarray(desirable, bool)), gap, -gap)
    elif known is None:
        mine, other = pair_scores(policy, counts).means()
        gap = mine - other
    else:
        gap = log_ratio_gap(pair_scores(policy, counts), pair_scores(known, counts), normalised=bool(spec.length_normalised))
    return np.asarray((1 - gap.sign().numpy()) / 2, np.float64)


def _share_of_pairs(gaps: Tensor, tie: float = 0.0) -> float:
    """The share of gaps (n,) above 0; those within `tie` of it count half."""
    return float(torch.where(gaps.abs() <= tie, 0.5, (gaps > 0).double()).mean())


def pair_scores(sums: Tensor, tokens: Tensor) -> PairScores:
    """The scores of pairs from log-probabilities and tokens (2n,) that alternate: chosen, rejected."""
    return PairScores(sums[::2], sums[1::2], tokens[::2], tokens[1::2])


def order_of_pairs(examples: Sequence[Example], spec: TrainSpec) -> StepOrder:
    """The order of pairs; a step has pairs of similar length if `spec.length_grouping`."""
    lengths = _pair_lengths(examples)
    return StepOrder(len(lengths), spec.batch_size, spec.seed, tuple(lengths) if spec.length_grouping else None)


def _pair_lengths(examples: Sequence[Example]) -> list[int]:
    """The tokens of both rows of each pair."""
    return [len(examples[at].ids) + len(examples[at + 1].ids) for at in range(0, len(examples), 2)]


