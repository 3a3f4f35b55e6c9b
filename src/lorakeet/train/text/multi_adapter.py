"""Trains several adapters together on one frozen base, with the results of single runs.

    each round    every active member takes one step of its own: a small one packed with those of others, so that the base's
                  weights are read once for all; any other alone, in the micro-batches of a single run → forward and backward →
                  gradients of each member → its own loss scale, checks, clipping, learning rate and AdamW
    at intervals  its held-out loss → its best values; a member that is done, or diverges, leaves

The base is in memory once, and for small steps its weights are read once for all members' tokens. Rows attend only to
themselves and each token uses its own member's pairs (core/batched/stack), so a member's gradients are those of its single run,
to rounding. Only dropout draws other numbers, from the first member's seed and the round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorakeet.core.initialise import seed_for
from lorakeet.core.layers.linear import LoraEmbedding, LoraLinear
from lorakeet.core.plan import Plan
from lorakeet.core.selection import Selection, Share
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch
from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.intervals import Estimate
from lorakeet.memory.allocator import keep_freed_memory, release_free_memory
from lorakeet.memory.spill import Spill
from lorakeet.models.inject import selection_of, trained_parameters
from lorakeet.models.modules import adapted_layers, find, output_layer
from lorakeet.models.text.cached_states import cache_states
from lorakeet.models.text.model import TextModel
from lorakeet.train import gradients, rng, schedule
from lorakeet.train.loss_scale import LossScale
from lorakeet.train.optimizer import Optimizer
from lorakeet.train.spec import TrainSpec
from lorakeet.train.stopping import EarlyStopping
from lorakeet.train.task import batch_seeds
from lorakeet.train.text.loss import head_losses
from lorakeet.train.text.streamed_gradients import loss_gradients_by_block
from lorakeet.train.text.task import TextTask


@dataclass(frozen=True)
class Member:
    """One adapter, injected into the model under `name`: its settings, its training rows, the rows that choose its best step.

    `make` makes the task of its single run.
    """

    name: str
    spec: TrainSpec
    train: Sequence[Example]
    held_out: Sequence[Example]
    make: Callable[..., TextTask] = TextTask

    def task(self, text: TextModel) -> TextTask:
        """The task of its single run."""
        return self.make(text, self.train, held_out=self.held_out, spec=self.spec, name=self.name)


@dataclass
class Progress:
    """The progress of a member; the model has its values of the last or, when done, of the best step."""

    member: Member
    total: int
    learning_rate: float
    step: int = 0
    losses: list[float] = field(default_factory=list)  # of each step taken, per target: nats of a token, or the loss of a pair
    held_out: list[tuple[int, Estimate]] = field(default_factory=list)  # (step, loss)
    watch: EarlyStopping = field(default_factory=EarlyStopping)
    done: str = ""  # the reason it stopped; empty while active
    diverged: bool = False
    tokens: int = 0

    @property
    def best(self) -> Estimate | None:
        """The held-out loss at the best step."""
        return next((loss for step, loss in self.held_out if step == self.watch.best_step), None)

    @property
    def unit(self) -> str:
        """Of the losses, after a space; empty where they have none."""
        return " nats a token" if self.member.spec.registered.nats else ""

    def beyond_recovery(self, loss: float) -> bool:
        """True if a loss is so far above the base's that the member has diverged."""
        return self.watch.diverged(loss, nats=self.member.spec.registered.nats)


class MultiAdapterTraining:
    """Members in training. `round` takes one step of each active member; `finish` restores the best values of each."""

    def __init__(
        self,
        text: TextModel,
        members: Sequence[Member],
        *,
        spill: Spill | None = None,
        together: int = 0,
        folder: Path | None = None,
    ) -> None:
        """Best values are stored in scratch files in `folder`, or in memory without it or if writing fails.

        With a streamed model, `together` batches (0: all of a step) go through a loaded block, and the inputs of blocks are
        stored in `spill` (default: where they are). Raises ConfigError for no members, equal names, or adapters that cannot
        share a batch.
        """
        names = [member.name for member in members]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"Adapters that are trained together need different names, at least one; given: {names}.")
        if text.attention != "varlen":
            raise ConfigError("Training several adapters at once needs model.attention varlen.")
        self.text, self.spill, self.together = text, spill or Spill(), together
        _require_sharable(text, names)
        self._divided = text.with_every_token(cached=True, pad=True)  # for batches whose tokens have different adapters
        self.selection: Selection = selection_of(text.model)
        self._members = [_Learner(text, member, folder) for member in members]
        self._rounds = 0

    @property
    def progress(self) -> list[Progress]:
        """The progress of each member, in the given order."""
        return [learner.at for learner in self._members]

    def round(self) -> None:
        """Takes one optimizer step of every active member."""
        active = [learner for learner in self._members if not learner.at.done]
        for learner in active:
            if learner.at.step == 0:
                self._evaluate(learner)
        active = [learner for learner in active if not learner.at.done]
        if not active:
            return
        for learner in active:
            cache_states(self.text, learner.rows, micro_tokens=learner.at.member.spec.micro_tokens)
        tokens = max(learner.at.member.spec.micro_tokens for learner in active)
        groups = groups_of([self._start_step(learner) for learner in active], tokens)
        self.text.train()
        if self.text.streamed is not None:
            groups = [merge_groups(groups)]
        self._rounds += 1
        with torch.random.fork_rng(devices=rng.cuda_devices(self.text.device)):
            torch.manual_seed(seed_for(self.progress[0].member.spec.seed, f"many/{self._rounds}"))
            for group in groups:
                self._gradients(active, group.batches)
                for index in group.members:
                    self._step(active[index])  # also drops its gradients

    def finish(self) -> None:
        """Restores every member's best values in the model; members without any are unchanged."""
        for learner in self._members:
            learner.restore()
        self.selection.use(None)

    def stop(self, name: str, reason: str) -> None:
        """Stops member `name` (a search has rejected it); its best values stay."""
        learner = next(learner for learner in self._members if learner.at.member.name == name)
        learner.at.done = learner.at.done or reason

    def _start_step(self, learner: _Learner) -> list[Batch]:
        self.selection.use(learner.at.member.name)
        return learner.start_step()

    def _gradients(self, active: Sequence[_Learner], joint: Sequence[JointBatch]) -> None:
        """Adds the gradients of each member's mean loss, and sums its losses."""
        batches = [one.batch.to(self.text.device) for one in joint]
        texts = [self._divided if one.alone is None else self.text for one in joint]

        def prepare(number: int) -> TextModel:
            """Selects the members' adapters for a batch; a single member is computed as in its single run."""
            one, text = joint[number], texts[number]
            if one.alone is not None:
                self.selection.use(active[one.alone].at.member.name)
            else:
                shares, place = [], 0
                for index, batch in one.parts:
                    shares.append(Share(place, place + batch.tokens, active[index].at.member.name))
                    place += batch.tokens
                self.selection.divide(shares, units=text.computed_tokens(batches[number].tokens))
            return text

        def loss(number: int) -> tuple[Tensor, Tensor]:
            """Σ of the members' mean losses, each times its loss scale, to differentiate, and Σ over all targets."""
            hidden, parts = texts[number].hidden(batches[number]), joint[number].parts
            chunk = min(active[index].at.member.spec.head_chunk for index, _ in parts)
            losses = head_losses(self.text, hidden, batches[number].target_ids, chunk=chunk)
            means = []
            for (index, part), own in zip(parts, torch.split(losses, [batch.targets for _, batch in parts]), strict=True):
                summed = active[index].task.loss_of(part, own)
                means.append(summed / (active[index].targets / active[index].scale.value))
                active[index].summed.append(summed.detach())
            return torch.stack(means).sum(), losses.detach().sum()

        if self.text.streamed is not None:
            loss_gradients_by_block(
                self.text, self.text.streamed, batches, loss, spill=self.spill, together=self.together, prepare=prepare
            )
            return
        for number, seed in enumerate(batch_seeds(len(joint))):  # as a streamed model draws them
            with torch.random.fork_rng(devices=rng.cuda_devices(self.text.device)):
                torch.manual_seed(seed)
                prepare(number)
                loss(number)[0].backward()  # type: ignore[no-untyped-call]

    def _step(self, learner: _Learner) -> None:
        """Takes the step of a member with complete gradients, and evaluates it if due."""
        learner.step()
        due = learner.at.step == learner.at.total or learner.at.step % learner.every == 0
        if not learner.at.done and due:
            self._evaluate(learner)
        if not learner.at.done and learner.at.step == learner.at.total:
            learner.at.done = "all steps done"

    def _evaluate(self, learner: _Learner) -> None:
        member = learner.at.member
        if not member.held_out:
            return
        self.selection.use(member.name)
        found = learner.task.held_out()
        self.text.train()
        if found is not None:
            learner.see(found.mean(seed=member.spec.seed))


class _Learner:
    """One member with its optimizer and progress; its best values are in a scratch file in `folder`, or in memory."""

    def __init__(self, text: TextModel, member: Member, folder: Path | None) -> None:
        spec = member.spec
        self.task = member.task(text)
        self.parameters = trained_parameters(text.model, member.name)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)  # injecting the next adapter had frozen this one
        self.optimizer = Optimizer(self.parameters, spec)
        rate = spec.learning_rate if spec.learning_rate is not None else self.task.learning_rate
        self.at = Progress(member, spec.total_steps(self.task.steps_per_epoch), rate)
        self.warmup = schedule.warmup_steps(self.at.total, spec.warmup_fraction)
        self.every = spec.evaluation_interval(self.task.steps_per_epoch)
        self.scale = LossScale.of(text.dtype)
        self.targets, self.summed = 0, list[Tensor]()  # of this step: supervised tokens or pairs; the losses of its batches
        self._best: Spill | None = None
        self._folder = folder

    def start_step(self) -> list[Batch]:
        """Splits this step's rows into micro-batches, and resets the sum of losses; the member's adapter is active."""
        step = self.at.step
        small = sum(len(row.ids) for row in self.rows) <= SMALL  # joins others' rows if it is one batch
        found = self.task.joinable(step) if small else self.task.batches(step)
        self.task.begin_step(found)
        self.targets, self.summed = sum(self.task.size(batch).targets for batch in found), []
        return found

    @property
    def rows(self) -> list[Example]:
        """This step's rows."""
        return self.task.step_rows(self.at.step)

    def step(self) -> None:
        """Takes the step, unless the loss or the gradients are not finite: in float16 it is left out then, as in a single run."""
        at, spec = self.at, self.at.member.spec
        self.scale.unscale(self.parameters)
        norm = gradients.gradient_norm(self.parameters)
        losses = torch.stack(self.summed).tolist() if self.summed else []  # read once, behind all passes
        mean = sum(losses) / max(self.targets, 1)
        if not (math.isfinite(mean) and bool(torch.isfinite(norm))):
            self.optimizer.adamw.zero_grad(set_to_none=True)
            if self.scale.dynamic and self.scale.overflowed():
                self._count()
                return
            at.done, at.diverged = f"step {at.step + 1}: the loss is {mean:.4g}, the gradient's norm {norm.item():.4g}", True
            return
        if at.beyond_recovery(mean):
            self.optimizer.adamw.zero_grad(set_to_none=True)
            at.done, at.diverged = f"step {at.step + 1}: the loss is {mean:.4g}{at.unit}", True
            return
        if at.step - self.scale.skipped < 2 and not self._check_gradients(mean):
            return
        gradients.clip(self.parameters, spec.clip_norm, norm=norm)
        self._count()
        at.losses.append(mean)
        self.scale.record_step()
        self.optimizer.step(at.learning_rate * schedule.factor(at.step, at.total, warmup=self.warmup, shape=spec.schedule))

    def _count(self) -> None:
        """Counts a step and its tokens."""
        self.at.tokens += sum(len(row.ids) for row in self.rows)
        self.at.step += 1

    def _check_gradients(self, mean: float) -> bool:
        """True if the gradient reached every trained tensor. If the first step lost it, this member has diverged."""
        at = self.at
        try:
            gradients.require_gradients(self.parameters, len(at.losses) + 1)
        except VerificationFailed:
            if not at.losses or mean <= at.losses[0]:
                raise
            self.optimizer.adamw.zero_grad(set_to_none=True)
            at.done = f"step {at.step + 1}: the loss is {mean:.4g}{at.unit}, with zero gradients"
            at.diverged = True
        return not at.diverged

    def see(self, loss: Estimate) -> None:
        """Records a held-out loss: stores the values if it is the best; ends the member if it diverged or stopped improving."""
        at, watch, spec = self.at, self.at.watch, self.at.member.spec
        at.held_out.append((at.step, loss))
        if not math.isfinite(loss.value) or at.beyond_recovery(loss.value):
            at.done, at.diverged = f"step {at.step}: the held-out loss is {loss.value:.4g}{at.unit}", True
            return
        if watch.see(at.step, loss.value, min_improvement=spec.min_improvement):
            self._best = self._kept()
        if watch.exhausted(spec.patience):
            at.done = f"no improvement in {watch.stale} evaluations after step {watch.best_step}"

    def _kept(self) -> Spill:
        """Copies the current values. If the disk fails, training continues with copies in memory, which the plan allows for."""
        if self._folder is not None:
            try:
                kept = Spill(self._folder)
                for name, parameter in self.parameters.items():
                    kept.put(name, parameter.detach().cpu())
            except EnvironmentProblem:
                self._folder = None
            else:
                return kept
        kept = Spill()
        for name, parameter in self.parameters.items():
            kept.put(name, parameter.detach().cpu().clone())
        return kept

    def restore(self) -> None:
        """Restores the best values, if any, after the last step."""
        if self._best is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self._best.get(name))


def why_not_together(text: TextModel, plan: Plan) -> str:
    """The reason why adapters of this plan cannot be trained together on this model; empty if they can."""
    if text.attention != "varlen":
        return "several adapters at once need model.attention varlen"
    head = output_layer(text.model)
    kinds = ("experts", "conv2d")
    wrong = [entry.path for entry in plan.entries if entry.kind in kinds or find(text.model, entry.path) is head]
    wrong += [extra.path for extra in plan.extras]
    return f"an adapter on {wrong[0]} cannot share a batch with others" if wrong else ""


def _require_sharable(text: TextModel, names: Sequence[str]) -> None:
    """Raises ConfigError that lists the layers whose adapters cannot differ within a batch."""
    head = text.model.get_output_embeddings()
    wrong = [
        path
        for path, layer in adapted_layers(text.model)
        if (layer is head or not isinstance(layer, (LoraLinear, LoraEmbedding))) and any(name in layer.adapters for name in names)
    ]
    if wrong:
        shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ConfigError(
            f"Adapters on the output head, on experts and convolutions, whole trained modules and token rows cannot be trained "
            f"together in one batch: {shown}. Exclude these, or train one adapter at a time."
        )


def train_many(
    text: TextModel,
    members: Sequence[Member],
    *,
    watch: Callable[[MultiAdapterTraining], None] | None = None,
    spill: Spill | None = None,
    together: int = 0,
    budget: int | None = None,
    folder: Path | None = None,
) -> list[Progress]:
    """Trains all members to the end and leaves the best values of each in the model, no adapter active.

    `watch` is called after every round and may stop members (`MultiAdapterTraining.stop`). Without a `budget` in bytes for the
    process it keeps the memory of one step for the next, as train/loop does. Dropout draws other numbers than in a single run;
    without it a member ends where its single run ends, to rounding.
    """
    many = MultiAdapterTraining(text, members, spill=spill, together=together, folder=folder)
    release_free_memory()  # as train/loop does
    if budget is None:
        keep_freed_memory()
    while any(not at.done for at in many.progress):
        many.round()
        if watch is not None:
            watch(many)
    many.finish()
    return many.progress


SMALL = 512  # most tokens of a step that joins others


@dataclass(frozen=True)
class JointBatch:
    """Rows in one forward and backward pass: (number of the member, its rows)."""

    parts: tuple[tuple[int, Batch], ...]

    @property
    def alone(self) -> int | None:
        """The member, if all rows are of one."""
        return self.parts[0][0] if len(self.parts) == 1 else None

    @property
    def batch(self) -> Batch:
        """All rows, packed."""
        return self.parts[0][1] if len(self.parts) == 1 else join_batches([batch for _, batch in self.parts])


@dataclass(frozen=True)
class Group:
    """Members whose gradients are complete after these batches."""

    members: tuple[int, ...]
    batches: tuple[JointBatch, ...]


def groups_of(steps: Sequence[Sequence[Batch]], tokens: int) -> list[Group]:
    """Groups the members' steps, each a list of micro-batches, into joint batches; each member is in one group.

    Small steps share batches of about equal size, at most `tokens` tokens. Micro-batches without a target are left out. A
    member's batches are consecutive, so that its step is taken, and its gradients dropped, before the next member's.
    """
    filled = [(index, [batch for batch in step if batch.targets]) for index, step in enumerate(steps)]
    small = [(index, batches[0]) for index, batches in filled if len(batches) == 1 and batches[0].tokens <= SMALL]
    shared = {index for index, _ in small}
    found = [Group(tuple(index for index, _ in parts), (JointBatch(tuple(parts)),)) for parts in _packed(small, tokens)]
    others = ((index, batches) for index, batches in filled if index not in shared)
    return found + [Group((index,), tuple(JointBatch(((index, batch),)) for batch in batches)) for index, batches in others]


def merge_groups(groups: Sequence[Group]) -> Group:
    """All members and batches in one group, for a streamed base."""
    return Group(
        tuple(index for group in groups for index in group.members), tuple(one for group in groups for one in group.batches)
    )


def _packed(small: Sequence[tuple[int, Batch]], tokens: int) -> list[list[tuple[int, Batch]]]:
    """Splits, in order, into the fewest parts of at most `tokens` tokens, or one more; a longer batch is its own part."""
    whole = sum(batch.tokens for _, batch in small)
    enough = whole / max(1, math.ceil(whole / tokens))
    found: list[list[tuple[int, Batch]]] = []
    count = 0
    for index, batch in small:
        if not found or count >= enough or count + batch.tokens > tokens:
            found.append([])
            count = 0
        found[-1].append((index, batch))
        count += batch.tokens
    return found


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Packs several batches into one, on the host; targets keep the order of the batches."""
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.tokens)
    of_ids, of_places, of_targets = zip(*(batch.on_host() for batch in batches), strict=True)
    places = [each + start for each, start in zip(of_places, starts, strict=False)]
    ids, positions, wanted = numbers = np.concatenate(of_ids), np.concatenate(places), np.concatenate(of_targets)
    return Batch(
        ids=torch.from_numpy(ids),
        lengths=tuple(length for batch in batches for length in batch.lengths),
        target_positions=torch.from_numpy(positions),
        target_ids=torch.from_numpy(wanted),
        keys=tuple(key for batch in batches for key in batch.keys),
        numbers=numbers,
    )
