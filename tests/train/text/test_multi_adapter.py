"""Adapters trained together become what each becomes alone; each ends on its own; one pass reads the base for all of them."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakeet.core.base import DenseBase
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack_examples
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.memory.spill import Spill
from lorakeet.models import inject
from lorakeet.models.fuse import fuse
from lorakeet.models.modules import find
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.cached_states import cached_states
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.train import gradients
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text import multi_adapter
from lorakeet.train.text.multi_adapter import (
    SMALL,
    Group,
    Member,
    MultiAdapterTraining,
    groups_of,
    join_batches,
    merge_groups,
    train_many,
)
from lorakeet.train.text.task import TextTask
from tiny.gptq_folder import save_mixed_gptq
from tiny.models import save_tiny_llama
from tiny.shared_passes import members_of_passes
from tiny.streams import loaded

SPEC = TrainSpec(steps=6, batch_size=4, micro_tokens=400, learning_rate=5e-3, evaluate_every=2, patience=0)
WANTED = {
    "a": (LoraSpec(rank=4, alpha=12.0), SPEC, 1),
    "b": (LoraSpec(rank=2, alpha=6.0, target_modules=("q_proj", "v_proj")), dataclasses.replace(SPEC, steps=4, seed=3), 1),
    "c": (LoraSpec(rank=6, alpha=18.0, variant="dora"), dataclasses.replace(SPEC, learning_rate=1e-2, batch_size=3), 5),
}


def rows(count: int, seed: int) -> list[Example]:
    """Rows of 8 to 19 tokens that count upwards, the second half supervised."""
    generator = np.random.default_rng(seed)
    lengths, starts = generator.integers(8, 20, size=count), generator.integers(4, 60, size=count)
    return [
        Example(np.arange(start, start + n, dtype=np.int64), np.arange(n) >= n // 2, f"{seed}-{number}", None, False)
        for number, (start, n) in enumerate(zip(starts, lengths, strict=True))
    ]


def load(folder: Path, packed: Literal["none", "nf4", "int8"] = "none") -> TextModel:
    return load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu", quantize=QuantSpec(method=packed)))


def together(
    folder: Path, names: str, packed: Literal["none", "nf4", "int8"] = "none", **changes: Any
) -> tuple[TextModel, list[Member]]:
    text, members = load(folder, packed), []
    for name in names:
        lora, spec, seed = WANTED[name]
        spec = dataclasses.replace(spec, **changes)
        inject.inject(text.model, plan_for(text.model, lora, text.family), name, seed=spec.seed)
        members.append(Member(name, spec, rows(14, seed), rows(6, 2)))
    fuse(text.model)
    return text, members


def alone(
    folder: Path, name: str, out: Path, packed: Literal["none", "nf4", "int8"] = "none", **changes: Any
) -> tuple[dict[str, Tensor], float | None]:
    lora, spec, seed = WANTED[name]
    spec = dataclasses.replace(spec, **changes)
    text = load(folder, packed)
    inject.inject(text.model, plan_for(text.model, lora, text.family), seed=spec.seed)
    fuse(text.model)
    task = TextTask(text, rows(14, seed), held_out=rows(6, 2), spec=spec)
    outcome = train(task, spec, run=RunFolder.create(out))
    return {key: value.detach() for key, value in task.parameters().items()}, outcome.best_loss


def test_best_values_may_be_kept_on_disk(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, from the step that was best, in files that are gone afterwards."""
    found, kept = [], list[Path | None]()
    usual = Spill.__init__

    def watched(spill: Spill, folder: Path | None = None, *given: str) -> None:
        kept.append(folder)
        usual(spill, folder, *given)

    monkeypatch.setattr(Spill, "__init__", watched)
    for folder in (None, tmp_path):
        text, members = together(tiny_llama_folder, "ab", learning_rate=3.0)
        ended = train_many(text, members, folder=folder)
        assert any(at.watch.best_step not in (None, at.step) for at in ended), "or the last values would do"
        found.append([inject.trained_parameters(text.model, name)[key].clone() for name in "ab" for key in
                      inject.trained_parameters(text.model, name)])  # fmt: skip
    assert kept.count(tmp_path) >= 2 and list(tmp_path.iterdir()) == []
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_disk_that_takes_no_values_ends_no_training(tiny_llama_folder: Path, tmp_path: Path) -> None:
    found = []
    for folder in (None, tmp_path / "nowhere"):
        text, members = together(tiny_llama_folder, "a")
        train_many(text, members, folder=folder)
        found.append(list(inject.trained_parameters(text.model, "a").values()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return members_of_passes(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [400, 60])
def test_each_becomes_what_it_becomes_alone(tiny_llama_folder: Path, tmp_path: Path, shared: list[int], tokens: int) -> None:
    """In one pass for all that still learn, and in several, some of which members share."""
    text, members = together(tiny_llama_folder, "abc", micro_tokens=tokens)
    ended = train_many(text, members)
    assert shared == [3] * 4 + [2] * 2 if tokens == 400 else len(shared) > 10 and max(shared) == 2
    assert [at.step for at in ended] == [6, 4, 6]
    assert {at.done for at in ended} == {"all steps done"}
    for at in ended:
        name = at.member.name
        expected, best = alone(tiny_llama_folder, name, tmp_path / name, micro_tokens=tokens)
        found = inject.trained_parameters(text.model, name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
        assert at.best is not None and best is not None
        assert at.best.value == pytest.approx(best, rel=1e-4)
        assert [step for step, _ in at.held_out] == list(range(0, at.total + 1, 2))


@pytest.mark.slow
def test_steps_that_are_not_small_are_those_of_single_runs_to_the_last_bit(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in several micro-batches; and no member's gradients are held while the next one's are made."""
    monkeypatch.setattr("lorakeet.train.text.multi_adapter.SMALL", 0)
    text, members = together(tiny_llama_folder, "abc", micro_tokens=24)
    held = []
    usual = multi_adapter.batch_seeds

    def watched(count: int) -> Any:
        own = {name: inject.trained_parameters(text.model, name).values() for name in "abc"}
        held.append([name for name, parameters in own.items() if any(one.grad is not None for one in parameters)])
        return usual(count)

    monkeypatch.setattr(multi_adapter, "batch_seeds", watched)
    for at in train_many(text, members):
        name = at.member.name
        expected, best = alone(tiny_llama_folder, name, tmp_path / name, micro_tokens=24)
        found = inject.trained_parameters(text.model, name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert at.best is not None and at.best.value == best
    assert held == [[]] * 16


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["nf4", "int8", "gptq"])
def test_each_becomes_what_it_becomes_alone_over_a_packed_base(
    tiny_llama_folder: Path, tmp_path: Path, shared: list[int], packed: Literal["nf4", "int8", "gptq"]
) -> None:
    folder = tiny_llama_folder
    if packed == "gptq":
        folder = tmp_path / "packed"
        save_mixed_gptq(folder, "gptq")
    method: Literal["none", "nf4", "int8"] = "none" if packed == "gptq" else packed
    text, members = together(folder, "ab", method)
    for at in train_many(text, members):
        name = at.member.name
        expected, _ = alone(folder, name, tmp_path / name, method)
        for key, value in inject.trained_parameters(text.model, name).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert shared == [2] * 4 + [1] * 2


def streamed_or_not(folder: Path, store: Path | None, names: str) -> tuple[TextModel, list[Member]]:
    text, members = loaded(folder, store), []
    for name in names:
        lora, spec, seed = WANTED[name]
        spec = dataclasses.replace(spec, steps=3, micro_tokens=60)
        lora = dataclasses.replace(lora, dropout=0.2 if name == "b" else 0.0)
        initialise_adapter(text, plan_for(text.model, lora, text.family), seed=spec.seed, name=name)
        members.append(Member(name, spec, rows(14, seed), rows(6, 2)))
    return text, members


@pytest.mark.slow
@pytest.mark.parametrize(("together", "small"), [(0, 512), (1, 512), (0, 60), (2, 0)])
def test_over_a_streamed_base_they_become_the_same_to_the_last_bit(
    tmp_path: Path, together: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, and whichever steps share a pass."""
    monkeypatch.setattr("lorakeet.train.text.multi_adapter.SMALL", small)
    folder, found = save_tiny_llama(tmp_path / "model", num_hidden_layers=3), []
    for store in (None, tmp_path / "store"):
        text, members = streamed_or_not(folder, store, "abc")
        ended = train_many(text, members, spill=Spill(store), together=together)
        values = {f"{name}/{key}": value for name in "abc" for key, value in inject.trained_parameters(text.model, name).items()}
        found.append(([at.losses for at in ended], values))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


def test_a_block_is_read_twice_a_round_however_many_members_there_are(tmp_path: Path) -> None:
    text, members = streamed_or_not(save_tiny_llama(tmp_path / "model", num_hidden_layers=6), tmp_path / "store", "abc")
    many = MultiAdapterTraining(text, [dataclasses.replace(member, held_out=()) for member in members])
    assert text.streamed is not None
    many.round()
    before, blocks = text.streamed.stream.bytes_read, sum(record.bytes for record in text.streamed.stream.records)
    many.round()
    assert blocks < text.streamed.stream.bytes_read - before < 2 * blocks


def test_the_base_is_multiplied_once_for_all(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for names in ("a", "ab"):
        text, members = together(tiny_llama_folder, names, micro_tokens=400)
        calls = []
        usual = DenseBase.matmul
        monkeypatch.setattr(DenseBase, "matmul", lambda self, x, usual=usual, calls=calls: calls.append(1) or usual(self, x))
        many = MultiAdapterTraining(text, [dataclasses.replace(member, held_out=()) for member in members])
        many.round()
        counts.append(len(calls))
        monkeypatch.setattr(DenseBase, "matmul", usual)
    assert counts[0] == counts[1] > 0


def test_rows_whose_states_are_kept_begin_above_and_members_become_the_same(tiny_llama_folder: Path) -> None:
    """Also those that are kept when a step first sees them, which pass the blocks below once for all members and epochs."""
    found, passed = [], list[int]()
    for kept in (False, True):
        text, lora = load(tiny_llama_folder), LoraSpec(rank=4, alpha=12.0, layers="top:1")
        plan = plan_for(text.model, lora, text.family)
        block: Any = find(text.model, "model.layers.0")
        block.register_forward_hook(lambda block, given, named, out: passed.append(sum(named["row_lengths"])), with_kwargs=True)
        states = cached_states(text, rows(6, 2), folder=None, micro_tokens=200, plans=[plan], later=rows(14, 1))
        with states if kept else nullcontext():
            passed.clear()
            for name in "ab":
                initialise_adapter(text, plan, seed=3, name=name)
            specs = [dataclasses.replace(SPEC, steps=8, seed=number) for number in range(2)]
            members = [Member(name, spec, rows(14, 1), rows(6, 2)) for name, spec in zip("ab", specs, strict=True)]
            ended = train_many(text, members)
        found.append([(at.losses, [loss.value for _, loss in at.held_out]) for at in ended])
    assert sum(passed) == sum(len(row.ids) for row in rows(14, 1))
    for one, other in zip(*found, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5) and one[1] == pytest.approx(other[1], rel=1e-5)


def test_each_ends_on_its_own(tiny_llama_folder: Path) -> None:
    text, members = together(tiny_llama_folder, "ab")
    members[0] = dataclasses.replace(members[0], spec=dataclasses.replace(SPEC, learning_rate=1e-30, patience=1))

    def give_up(many: MultiAdapterTraining) -> None:
        if many.progress[1].step == 3:
            many.stop("b", "given up")

    stale, stopped = train_many(text, members, watch=give_up)
    assert (stale.done, stale.step) == ("no improvement in 1 evaluations after step 2", 4)
    assert (stopped.done, stopped.step) == ("given up", 3)


@pytest.mark.parametrize("first", [False, True])
def test_one_that_diverges_leaves_the_others_alone(
    tiny_llama_folder: Path, tmp_path: Path, shared: list[int], first: bool
) -> None:
    """Whichever comes first: rows are attended together, but no number of one meets another's."""
    text, members = together(tiny_llama_folder, "ab")
    with torch.no_grad():
        next(iter(inject.trained_parameters(text.model, "b").values())).fill_(float("nan"))
    members[1] = dataclasses.replace(members[1], held_out=())
    good, bad = train_many(text, members[::-1])[::-1] if first else train_many(text, members)
    assert bad.diverged and bad.step == 0 and shared == [2] + [1] * 5
    assert bad.done.startswith("step 1: the loss is")
    assert bad.done.endswith("the gradient's norm nan")
    expected, _ = alone(tiny_llama_folder, "a", tmp_path / "a")
    for key, value in inject.trained_parameters(text.model, "a").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert good.done == "all steps done"


def test_dropout_draws_from_the_seed_and_leaves_the_generator_alone(tiny_llama_folder: Path) -> None:
    """Whatever torch has drawn before: a search is a function of its settings and its seed."""
    found = []
    for before in (1, 2):
        torch.manual_seed(before)
        text = load(tiny_llama_folder)
        inject.inject(text.model, plan_for(text.model, LoraSpec(rank=4, alpha=12.0, dropout=0.3), text.family), "a", seed=0)
        state = torch.get_rng_state()
        found.append(train_many(text, [Member("a", dataclasses.replace(SPEC, steps=2), rows(14, 1), ())])[0].losses)
        assert torch.equal(torch.get_rng_state(), state)
    plain, members = together(tiny_llama_folder, "a", steps=2)
    assert found[0] == found[1] != train_many(plain, [dataclasses.replace(members[0], held_out=())])[0].losses


def test_a_member_whose_gradients_are_lost_in_a_jump_has_diverged(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the loss did not rise, the model is to blame, and that is an error."""
    def lost(parameters: dict[str, Tensor], step: int) -> None:
        if step == 2:
            raise VerificationFailed("only zeros")

    monkeypatch.setattr(gradients, "require_gradients", lost)
    text, members = together(tiny_llama_folder, "a", learning_rate=3.0, steps=2)
    hot = train_many(text, [dataclasses.replace(members[0], held_out=())])[0]
    assert hot.diverged and hot.step == 1 and hot.done.endswith("with zero gradients")
    text, members = together(tiny_llama_folder, "a", learning_rate=1e-2, steps=2, batch_size=14)
    with pytest.raises(VerificationFailed):
        train_many(text, [dataclasses.replace(members[0], held_out=())])


def of_one_round(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> list[dict[str, Tensor]]:
    """The gradients of two members' first step, which has as many targets as would make those of activations 0 in float16."""
    text = load_text_model(ModelSpec(path=str(folder), dtype=dtype, products="float32", device="cpu"))  # type: ignore[arg-type]
    members, found = [], list[dict[str, Tensor]]()
    for number, name in enumerate("ab"):
        lora, spec, seed = WANTED[name]
        inject.inject(text.model, plan_for(text.model, lora, text.family), name, seed=spec.seed)
        with torch.no_grad():
            for place, parameter in enumerate(inject.trained_parameters(text.model, name).values()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * number + place)))
        members.append(Member(name, spec, rows(14, seed), ()))
    many, norm = MultiAdapterTraining(text, members), gradients.gradient_norm
    for learner in many._members:
        task, size = learner.task, learner.task.size

        def of_many(batch: Any, size: Any = size) -> Any:
            return dataclasses.replace(size(batch), targets=100_000 * size(batch).targets)

        monkeypatch.setattr(task, "size", of_many)

    def seen(parameters: Any) -> Tensor:
        found.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
        return norm(parameters)

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "gradient_norm", seen)
        many.round()
    return found


def test_in_float16_each_has_a_loss_scale(
    tiny_llama_folder: Path, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = of_one_round(tiny_llama_folder, monkeypatch, "float32")
    narrow = of_one_round(tiny_llama_folder, monkeypatch, "float16")
    assert shared == [2, 2] and len(narrow) == 2
    for mine, theirs in zip(narrow, exact, strict=True):
        off = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
        assert (off / sum(float(each.square().sum()) for each in theirs.values())) ** 0.5 < 0.02


def test_in_float16_a_step_that_overflows_is_left_out_until_the_scale_is_of_no_use(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float16", products="float32", device="cpu"))
    members = []
    for name in "ab":
        lora, spec, seed = WANTED[name]
        inject.inject(text.model, plan_for(text.model, lora, text.family), name, seed=spec.seed)
        members.append(Member(name, dataclasses.replace(spec, steps=24, evaluate_every=24), rows(14, seed), rows(6, 2)))
    many = MultiAdapterTraining(text, members)
    whole, broken = many._members
    whole.scale.value = 2.0**24
    monkeypatch.setattr(broken.task, "loss_of", lambda _, own: own.sum() * float("inf"))
    while any(not at.done for at in many.progress):
        many.round()
    good, lost = many.progress
    assert good.step == 24 and not good.diverged and 0 < whole.scale.skipped == 24 - len(good.losses) < 20
    assert whole.scale.value == 2.0 ** (24 - whole.scale.skipped) and good.losses[-1] < good.losses[0]
    assert lost.diverged and lost.losses == [] and broken.scale.skipped == 17 and "the loss is inf" in lost.done


def test_what_cannot_share_a_batch_is_named(tiny_llama_folder: Path) -> None:
    text = load(tiny_llama_folder)
    lora = LoraSpec(rank=4, alpha=12.0, target_modules=("q_proj", "lm_head"))
    inject.inject(text.model, plan_for(text.model, lora, text.family), "a")
    with pytest.raises(ConfigError, match=r"cannot be trained together in one batch: .*lm_head"):
        MultiAdapterTraining(text, [Member("a", SPEC, rows(4, 1), ())])
    with pytest.raises(ConfigError, match="different names"):
        MultiAdapterTraining(text, [])


def rows_of_batches(*lengths: int, supervised: bool = True) -> list[Example]:
    return [
        Example(np.arange(n, dtype=np.int64), (np.arange(n) >= n // 2) & supervised, f"{number}", None, False)
        for number, n in enumerate(lengths)
    ]


def step(*lengths: int) -> list[Batch]:
    """A step of one micro-batch."""
    return [pack_examples(rows_of_batches(*lengths))]


def test_joined_batches_keep_their_rows_and_targets() -> None:
    examples = rows_of_batches(8, 19, 12, 9, 11)
    joined, whole = join_batches([pack_examples(examples[:2]), pack_examples(examples[2:])]), pack_examples(examples)
    assert (joined.lengths, joined.keys) == (whole.lengths, whole.keys)
    for part in ("ids", "target_positions", "target_ids"):
        assert torch.equal(getattr(joined, part), getattr(whole, part))


def test_small_steps_share_passes_of_about_equal_size() -> None:
    steps = [step(20, 20) for _ in range(8)]
    groups = groups_of(steps, 100)
    assert [group.members for group in groups] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    groups = groups_of(steps, 200)
    assert [group.members for group in groups] == [(0, 1, 2, 3), (4, 5, 6, 7)], "not five and three"
    assert all(len(group.batches) == 1 and group.batches[0].alone is None for group in groups)
    assert torch.equal(groups[0].batches[0].batch.ids, join_batches([one for own in steps[:4] for one in own]).ids)


@pytest.mark.parametrize("tokens", [1, 50, 170])
def test_no_pass_holds_more_tokens_than_that_of_a_single_run(tokens: int) -> None:
    steps = [step(length) for length in (50, 9, 40, 30, 30, 41)]
    groups = groups_of(steps, tokens)
    assert all(one.batch.tokens <= tokens or one.alone is not None for group in groups for one in group.batches)
    assert [index for group in groups for index in group.members] == list(range(6))


def test_larger_steps_are_by_themselves_and_do_not_part_the_small_ones() -> None:
    large = [pack_examples(rows_of_batches(SMALL - 1)), pack_examples(rows_of_batches(2))]
    steps = [step(10), large, step(12), step(SMALL + 1), step(SMALL)]
    groups = groups_of(steps, 1024)
    assert [group.members for group in groups] == [(0, 2, 4), (1,), (3,)]
    assert [one.alone for one in groups[1].batches] == [1, 1] and [one.batch for one in groups[1].batches] == large
    whole = merge_groups(groups)
    assert whole == Group((0, 2, 4, 1, 3), tuple(one for group in groups for one in group.batches))


def test_what_has_no_target_does_not_pass_and_its_member_still_has_a_group() -> None:
    silent = [pack_examples(rows_of_batches(10, supervised=False))]
    groups = groups_of([silent, [*silent, *step(10)], step(10)], 1024)
    assert {group.members: len(group.batches) for group in groups} == {(1, 2): 1, (0,): 0}
