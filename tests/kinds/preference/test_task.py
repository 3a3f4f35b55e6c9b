"""Pairs in the loop: losses and gradients are those of the plain model, row by row, however the pairs are cut and computed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.kinds.preference.loss import PairScores, kto_losses, preference_losses
from lorakeet.kinds.preference.spec import OBJECTIVES, PreferenceSpec, needs_reference
from lorakeet.kinds.preference.task import PreferenceTask, Reference, not_preferred, order_of_pairs, pair_losses
from lorakeet.memory.spill import Spill
from lorakeet.models.inject import activate, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.train.spec import TrainSpec
from tiny.streams import loaded

PAIRS = 6
PREFERENCES = list(OBJECTIVES)


def pairs(count: int, seed: int, *, prompt: int = 6) -> list[Example]:
    """Prompts of about `prompt` tokens, each with two answers of 2 to 6 tokens."""
    generator, found = np.random.default_rng(seed), []
    for number in range(count):
        before = generator.integers(4, 60, size=prompt + number % 3)
        for answer in range(2):
            ids = np.concatenate([before, generator.integers(4, 60, size=int(generator.integers(2, 7)))]).astype(np.int64)
            found.append(Example(ids, np.arange(len(ids)) >= len(before), f"{seed}-{number}-{answer}", None, False))
    return found


def task_on(
    text: Any, objective: str, *, micro_tokens: int = 64, examples: list[Example] | None = None, **given: Any
) -> PreferenceTask:
    spec = TrainSpec(objective=objective, batch_size=PAIRS, micro_tokens=micro_tokens, learning_rate=1e-2)  # type: ignore[arg-type]
    rows = pairs(PAIRS, 1) if examples is None else examples
    flags = [number % 3 != 0 for number in range(len(rows) // 2)]
    preference = PreferenceSpec().resolved(objective)
    return PreferenceTask(
        text, rows, held_out=pairs(4, 2), spec=spec, preference=preference, desirable=(flags, flags[:4]), **given
    )


def adapted(folder: Path, *, attention: str = "auto") -> Any:
    """A model whose pairs change what it computes: B is not 0."""
    spec = ModelSpec(path=str(folder), dtype="float32", device="cpu", attention=attention)  # type: ignore[arg-type]
    text = load_text_model(spec)
    return filled(initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4), text.family), seed=0))


def filled(text: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(text.model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return text


def with_reference(task: PreferenceTask) -> PreferenceTask:
    if needs_reference(task.objective):
        activate(task.text.model, None)
        train, held_out = (task.log_probs(rows)[0] for rows in (task.train, task.held_out_rows))
        task.reference = Reference(train, held_out, task.spec.micro_tokens)
        activate(task.text.model, "default")
    return task


def gradients(task: PreferenceTask) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first step and the gradients of every parameter."""
    for parameter in task.parameters().values():
        parameter.grad = None
    batches = task.batches(0)
    count = sum(task.size(batch).targets for batch in batches)
    total = task.gradients(batches, count).item() / count
    return total, {name: parameter.grad.clone() for name, parameter in task.parameters().items() if parameter.grad is not None}


def apart(one: Tensor, other: Tensor) -> float:
    """The length of the difference of two gradients, as a share of that of the second; both were summed in fp32."""
    return float((one - other).norm() / other.norm())


def plain_scores(text: Any, rows: list[Example]) -> Tensor:
    """log p of each answer by one pass of the model for each row, with gradient."""
    sums = []
    for row in rows:
        ids = torch.from_numpy(row.ids)
        logits = text.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        at = torch.from_numpy(np.flatnonzero(row.supervised))
        sums.append(logits[at - 1].gather(1, ids[at, None]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("objective", PREFERENCES)
def test_loss_and_gradients_are_those_of_the_plain_model(objective: str, tiny_llama_folder: Path) -> None:
    text = adapted(tiny_llama_folder, attention="eager")
    task = with_reference(task_on(text, objective))
    found, mine = gradients(task)
    for parameter in task.parameters().values():
        parameter.grad = None
    rows, counts = task.train, torch.tensor([int(row.supervised.sum()) for row in task.train], dtype=torch.float64)
    sums = plain_scores(text, rows)
    activate(text.model, None)
    with torch.no_grad():
        fixed = plain_scores(text, rows)
    activate(text.model, "default")
    if objective == "kto":
        kl = max(0.0, float((sums - fixed)[1::2].detach().mean()))
        losses = kto_losses(task.preference, sums[::2], fixed[::2], torch.from_numpy(task.desirable[0]), kl)
    else:
        policy, reference = (PairScores(each[::2], each[1::2], counts[::2], counts[1::2]) for each in (sums, fixed))
        losses = preference_losses(objective, task.preference, policy, reference if needs_reference(objective) else None)
    losses.mean().backward()
    assert found == pytest.approx(losses.mean().item(), rel=1e-5)
    for name, parameter in task.parameters().items():
        assert parameter.grad is not None
        assert apart(mine[name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("objective", PREFERENCES)
def test_neither_cuts_nor_attention_nor_shared_prompts_change_them(objective: str, tiny_llama_folder: Path) -> None:
    whole = gradients(with_reference(task_on(adapted(tiny_llama_folder), objective, micro_tokens=4096)))
    plain = adapted(tiny_llama_folder).with_options(share_prefix=False)
    for other in (
        task_on(adapted(tiny_llama_folder), objective, micro_tokens=1),
        task_on(plain, objective),
        task_on(adapted(tiny_llama_folder, attention="sdpa"), objective),
    ):
        loss, found = gradients(with_reference(other))
        assert loss == pytest.approx(whole[0], rel=1e-5)
        for name, gradient in found.items():
            assert apart(gradient, whole[1][name]) < 1e-4, name


@pytest.mark.parametrize("objective", PREFERENCES)
def test_the_order_of_a_steps_rows_changes_nothing(objective: str, tiny_llama_folder: Path) -> None:
    found = []
    for turned in (False, True):
        task = with_reference(task_on(adapted(tiny_llama_folder), objective, micro_tokens=40))
        rows, usual = list(range(PAIRS)), task.order
        assert sorted(usual.indices(0)) == rows
        order: Any = SimpleNamespace(indices=lambda step, rows=rows[::-1] if turned else rows: rows)
        task.order = order
        found.append(gradients(task))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(apart(gradient, found[1][1][name]) < 1e-4 for name, gradient in found[0][1].items())


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_streamed_blocks_give_the_same_bits(objective: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    found = []
    for store in (None, tmp_path / "store"):
        text = loaded(tiny_llama_folder, store) if store else loaded(tiny_llama_folder)
        text = filled(initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4), text.family), seed=0))
        found.append(gradients(with_reference(task_on(text, objective, spill=Spill(tmp_path) if store else None))))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_a_long_prompt_is_computed_once_for_both_answers(tiny_llama_folder: Path) -> None:
    task = task_on(adapted(tiny_llama_folder), "dpo", micro_tokens=4096, examples=pairs(3, 5, prompt=150))
    batches = task.batches(0)
    computed = sum(task.text.layout(batch).tokens for batch in batches)
    rows, prompts = sum(len(row.ids) for row in task.train), sum(150 + number for number in range(3))
    assert len(batches) == 3 and computed == rows - prompts


def test_streamed_pairs_are_packed(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for store, batches in ((None, PAIRS), (tmp_path / "store", 1)):
        text = loaded(tiny_llama_folder, store) if store else loaded(tiny_llama_folder)
        text = initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4), text.family), seed=0)
        task = task_on(text, "dpo", micro_tokens=4096, examples=pairs(PAIRS, 5, prompt=150))
        assert len(task.batches(0)) == batches


def test_pairs_of_one_prompt_keep_to_the_limits_of_the_model(tiny_llama_folder: Path) -> None:
    (first, *_), others = pairs(1, 5, prompt=150), pairs(PAIRS, 6, prompt=0)
    before = first.ids[:150]
    rows = [
        replace(row, ids=np.concatenate([before, row.ids]), supervised=np.arange(150 + len(row.ids)) >= 150) for row in others
    ]
    task = task_on(adapted(tiny_llama_folder), "dpo", micro_tokens=200, examples=rows)
    most = task.text.batch_limits([len(row.ids) for row in rows], 200).times * 200
    assert all(batch.tokens <= most or len(batch.lengths) == 2 for batch in task.batches(0))


def test_before_the_first_step_the_model_is_its_reference(tiny_llama_folder: Path) -> None:
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu"))
    text = initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4), text.family), seed=0)
    task = with_reference(task_on(text, "dpo"))
    held_out = task.held_out()
    assert held_out is not None and held_out.sums.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    assert task.measured is not None and abs(task.measured.lead) < 1e-4


def test_each_pair_weighs_the_same(tiny_llama_folder: Path) -> None:
    task = task_on(adapted(tiny_llama_folder), "dpo")
    batches = task.batches(0)
    assert sum(task.size(batch).targets for batch in batches) == PAIRS
    assert sum(task.size(batch).rows for batch in batches) == 2 * PAIRS
    assert sum(task.size(batch).tokens for batch in batches) == sum(len(row.ids) for row in task.train)


def test_both_answers_are_in_one_micro_batch(tiny_llama_folder: Path) -> None:
    task = task_on(adapted(tiny_llama_folder), "dpo", micro_tokens=30)
    for batch in task.batches(0):
        numbers = [int(key) for key in batch.keys]
        assert numbers[1::2] == [number + 1 for number in numbers[::2]]


def test_halving_stops_at_one_pair_a_micro_batch(tiny_llama_folder: Path) -> None:
    task = task_on(adapted(tiny_llama_folder), "dpo", micro_tokens=64)
    assert task.halve() == "train.micro_tokens 32"
    assert not task.halve()


def test_without_a_reference_a_loss_that_needs_one_is_an_error(tiny_llama_folder: Path) -> None:
    task = task_on(adapted(tiny_llama_folder), "dpo")
    with pytest.raises(ValueError, match="reference"):
        task.loss(task.batches(0)[0])


def test_held_out_pairs_say_what_is_preferred() -> None:
    spec = PreferenceSpec().resolved("dpo")
    sums, reference = np.array([-1.0, -4.0, -3.0, -2.0]), np.array([-2.0, -2.0, -2.0, -2.0])
    _, found = pair_losses("dpo", spec, sums, reference, np.array([1.0, 1.0, 1.0, 1.0]))
    assert found is not None and found.share == 0.5 and found.lead == pytest.approx(1.0) and found.chosen == pytest.approx(0.0)


def test_a_model_that_is_its_reference_prefers_neither_answer() -> None:
    """Rounding is no preference, whichever sign it has."""
    spec, reference = PreferenceSpec().resolved("dpo"), np.array([-2.0, -2.0, -3.0, -2.0])
    for noise in (0.0, 1e-6, -1e-6):
        _, found = pair_losses("dpo", spec, reference + noise * np.array([1, 0, 1, 0]), reference, np.ones(4))
        assert found is not None and found.share == 0.5
    _, likelier = pair_losses("simpo", PreferenceSpec().resolved("simpo"), reference, None, np.ones(4))
    assert likelier is not None and likelier.share == 0.25


def test_what_is_not_preferred_is_counted_whatever_beta_is() -> None:
    """The second pair gains nothing; for kto the first answer of each pair is rated, the second estimates the KL."""
    spec, tokens = PreferenceSpec().resolved("dpo"), np.ones(6)
    sums, reference = np.array([-1.0, -4.0, -2.0, -2.0, -5.0, -1.0]), np.full(6, -2.0)
    assert not_preferred("dpo", spec, sums, reference, tokens).tolist() == [0.0, 0.5, 1.0]
    assert not_preferred("simpo", spec, sums, None, tokens).tolist() == [0.0, 0.5, 1.0]
    rated = not_preferred("kto", spec, sums, reference, tokens, desirable=[True, True, False])
    assert rated.tolist() == [0.0, 0.5, 0.0]


def test_a_step_has_pairs_of_similar_length() -> None:
    rows, spec = pairs(8, 3), TrainSpec(objective="dpo", batch_size=2)
    assert order_of_pairs(rows, spec).lengths == tuple(len(rows[at].ids) + len(rows[at + 1].ids) for at in range(0, 16, 2))
    assert order_of_pairs(rows, replace(spec, length_grouping=False)).lengths is None
