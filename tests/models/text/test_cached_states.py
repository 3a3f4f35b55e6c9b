"""Passes that begin above the blocks that train nothing: the same numbers from fewer blocks, and only where that is so."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models import inject, modules
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.cached_states import cache_states, cached_states, frozen_depth
from lorakeet.models.text.digests import changed_tensors, frozen_digests
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.int8 import exact_products
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask

SPEC = TrainSpec(steps=2, batch_size=6, micro_tokens=60, learning_rate=1e-2)


def rows(count: int = 6, seed: int = 0) -> list[Example]:
    """Rows of 8 to 19 tokens that begin with the same two."""
    draw = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(draw.integers(8, 20, size=count)):
        ids = np.concatenate([[5, 9], draw.integers(4, 60, size=length - 2)]).astype(np.int64)
        found.append(Example(ids, np.arange(length) >= length // 2, f"{seed}-{number}", None, False))
    return found


def adapted(folder: Path, layers: str = "top:1", **changes: Any) -> TextModel:
    text = load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"))
    lora = LoraSpec(rank=4, alpha=12.0, layers=layers, **changes)
    text = initialise_adapter(text, plan_for(text.model, lora, text.family), seed=0)
    for name, parameter in inject.trained_parameters(text.model, "default").items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return text


def gradients(text: TextModel) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step over `rows()`, and the gradients of the pairs."""
    task = TextTask(text, rows(), held_out=(), spec=SPEC)
    parameters = task.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    batches = task.batches(0)
    loss = task.gradients(batches, sum(batch.targets for batch in batches)).item()
    return loss, {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def calls(text: TextModel) -> Counter[int]:
    """Counts how often each block computes from now on."""
    prefix, count = modules.block_prefix(text.model, text.family)
    found: Counter[int] = Counter()
    for number in range(count):
        block: Any = modules.unwrapped(modules.find(text.model, f"{prefix}.{number}"))  # type: ignore[arg-type]
        block.register_forward_hook(lambda *_, number=number: found.update([number]))
    return found


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_loss_and_the_gradients_are_the_same_and_the_blocks_below_do_not_compute(
    tiny_llama_folder: Path, tmp_path: Path, on_disk: bool
) -> None:
    text = adapted(tiny_llama_folder)
    loss, expected = gradients(text)
    counted = calls(text)
    with cached_states(text, rows(), folder=tmp_path if on_disk else None, micro_tokens=40) as prefix:
        assert prefix.depth == 1 and prefix.bytes == sum(len(row.ids) for row in rows()) * 32 * 4
        filling = counted.copy()
        assert filling[1] == 2 < filling[0], "the upper block computes only when a cut pass is compared with a whole one"
        again, found = gradients(text)
        assert counted[0] == filling[0] and counted[1] > 0
        assert list(tmp_path.iterdir()) == [], "the scratch file has no name"
    assert again == pytest.approx(loss, rel=1e-6)
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    assert text.frozen_prefix is None and gradients(text)[0] == loss, "afterwards all blocks compute as before"


def test_an_adapter_below_switches_the_kept_states_off(tiny_llama_folder: Path) -> None:
    """Kept states are those of the bare blocks."""
    text = adapted(tiny_llama_folder)
    with cached_states(text, rows(), folder=None, micro_tokens=40):
        other = adapted(tiny_llama_folder, layers="all")
        adapter = inject.adapter_of(other.model, "default", base="tiny")
        expected = gradients(other)[0]
        inject.attach(text.model, adapter, "all")
        inject.activate(text.model, "all")
        task = TextTask(text, rows(), held_out=rows(), spec=SPEC, name="all")
        found = task.held_out()
    assert found is not None
    assert float(found.sums.sum()) == pytest.approx(expected, rel=1e-5)


def test_only_frozen_blocks_below_every_trained_tensor_count(tiny_llama_folder: Path) -> None:
    assert frozen_depth(adapted(tiny_llama_folder)) == 1
    for changes in ({"layers": "all"}, {"layers": "0"}):
        with pytest.raises(ConfigError, match=r"the lowest block is adapted\. Adapt the top blocks only"):
            frozen_depth(adapted(tiny_llama_folder, **changes))
    with pytest.raises(ConfigError, match="something outside the blocks is trained"):
        frozen_depth(adapted(tiny_llama_folder, target_modules=("embed_tokens", "q_proj")))
    text = adapted(tiny_llama_folder)
    text.model.model.norm.weight.requires_grad_()
    with pytest.raises(ConfigError, match="something outside the blocks is trained"):
        frozen_depth(text)
    text = adapted(tiny_llama_folder)
    text.model.lm_head.weight = torch.nn.Parameter(text.model.lm_head.weight.detach().clone())
    assert frozen_depth(text) == 1, "a trained head that is not the embedding stands above the blocks"


def planned(text: TextModel, layers: str = "top:1", **changes: Any) -> Plan:
    return plan_for(text.model, LoraSpec(rank=4, alpha=12.0, layers=layers, **changes), text.family)


def test_of_several_plans_the_lowest_block_that_any_adapts_counts(tiny_llama_folder: Path) -> None:
    """As it does once their adapters are in the model."""
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu"))
    both = [planned(text, target_modules=("mlp",)), planned(text, target_modules=("attention",))]
    assert frozen_depth(text, both) == 1 == frozen_depth(adapted(tiny_llama_folder))
    with pytest.raises(ConfigError, match="the lowest block is adapted"):
        frozen_depth(text, [*both, planned(text, "0")])
    assert frozen_depth(text, [*both, planned(text, target_modules=("lm_head", "q_proj"))]) == 1
    for changes in ({"target_modules": ("embed_tokens", "q_proj")}, {"extra_modules": ("embed_tokens",)}):
        with pytest.raises(ConfigError, match="something outside the blocks is trained"):
            frozen_depth(text, [*both, planned(text, **changes)])


def test_rows_that_come_later_pass_the_blocks_below_once(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Adapters come into the model after the first rows were kept, and watchers see every block compute."""
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu"))
    counted, plan, said = calls(text), planned(text), list[str]()
    named: dict[str, Any] = {"folder": tmp_path, "micro_tokens": 40, "plans": [plan], "later": rows()[2:], "say": said.append}
    with cached_states(text, rows()[:2], **named) as prefix:
        assert "for 6 rows" in said[0] and f"({sum(len(row.ids) for row in rows()) * 32 * 4:,} bytes at most)" in said[0]
        first = prefix.bytes
        initialise_adapter(text, plan, seed=0)
        cache_states(text, rows(), micro_tokens=40)
        assert prefix.bytes == sum(len(row.ids) for row in rows()) * 32 * 4 > first > 0
        filled = counted[0]
        cache_states(text, rows(), micro_tokens=40)
        batch = pack_examples(rows())
        above = text.with_every_token(cached=True).hidden(batch)
        assert counted[0] == filled, "nothing below has computed again"
        torch.testing.assert_close(text.with_every_token().hidden(batch), above, rtol=1e-4, atol=1e-5)
        assert counted[0] == filled + 1
    cache_states(text, rows(), micro_tokens=40)
    assert counted[0] == filled + 1, "nothing is kept outside the context"


def test_rows_are_not_kept_while_an_adapter_below_is_in_use(tiny_llama_folder: Path) -> None:
    text = adapted(tiny_llama_folder)
    with cached_states(text, rows()[:2], folder=None, micro_tokens=40) as prefix:
        initialise_adapter(text, planned(text, "all"), seed=0, name="all")
        first = prefix.bytes
        cache_states(text, rows(), micro_tokens=40)
        assert prefix.bytes == first
        inject.activate(text.model, "default")
        cache_states(text, rows(), micro_tokens=40)
        assert prefix.bytes > first


def test_a_block_below_that_draws_random_numbers_is_found_out(tiny_llama_folder: Path) -> None:
    text = adapted(tiny_llama_folder)
    prefix, _ = modules.block_prefix(text.model, text.family)
    block: Any = modules.find(text.model, f"{prefix}.0")
    block.register_forward_hook(lambda module, given, out: out + 0.1 * torch.randn_like(out) if module.training else out)
    with pytest.raises(ConfigError, match="a pass that starts there differs by"), cached_states(
        text, rows(), folder=None, micro_tokens=40
    ):
        pass
    assert text.frozen_prefix is None and not text.model.training


def test_dropout_of_the_pairs_above_is_no_hindrance(tiny_llama_folder: Path) -> None:
    with cached_states(adapted(tiny_llama_folder, dropout=0.3), rows(), folder=None, micro_tokens=40) as prefix:
        assert prefix.depth == 1


def test_products_in_int8_are_exact_below_and_are_no_hindrance(tiny_llama_folder: Path) -> None:
    quantize = QuantSpec(method="int8", int8_products=True)
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu", quantize=quantize))
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4, alpha=12.0, layers="top:1"), text.family), seed=0)
    with cached_states(text, rows(), folder=None, micro_tokens=40):
        with exact_products(text.model):
            exact = gradients(text)[0]
        assert gradients(text)[0] != exact, "above they are in int8"
        uncached = text.with_options(use_cached=False)
        with exact_products(text.model):
            assert gradients(uncached)[0] == pytest.approx(exact, rel=1e-5)


def test_a_block_that_hands_on_more_than_its_states_is_refused(tiny_llama_folder: Path) -> None:
    text = adapted(tiny_llama_folder)
    prefix, _ = modules.block_prefix(text.model, text.family)
    upper: Any = modules.find(text.model, f"{prefix}.1")
    lower: Any = modules.find(text.model, f"{prefix}.0")
    handed: dict[str, torch.Tensor] = {}
    lower.register_forward_hook(lambda module, given, out: handed.update(states=out))
    upper.register_forward_pre_hook(lambda module, given: (given[0] + handed.pop("states"),))
    with pytest.raises(ConfigError, match=r"cannot be entered between its blocks \(KeyError"), cached_states(
        text, rows(), folder=None, micro_tokens=40
    ):
        pass


def test_a_full_disk_is_seen_beforehand(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(EnvironmentProblem, match=r"take [\d,]+ bytes .* and 100 are free.*keep_prefix_states off"), cached_states(
        adapted(tiny_llama_folder), rows(), folder=tmp_path, micro_tokens=40
    ):
        pass


def test_kept_states_do_not_depend_on_the_order_of_the_rows(tiny_llama_folder: Path) -> None:
    """So that a resumed run, which computes them again, ends in the same bytes."""
    found = []
    for given in (rows(), [*rows()[3:], *rows()[:3], rows()[0]]):
        text = adapted(tiny_llama_folder)
        with cached_states(text, given, folder=None, micro_tokens=40) as prefix:
            ids = torch.from_numpy(np.concatenate([row.ids for row in rows()]))
            states = prefix.states_of(ids, [len(row.ids) for row in rows()], 0)
            assert states is not None
            found.append(states)
    assert torch.equal(*found)


def test_adapters_are_no_part_of_it(tiny_model: Callable[..., Any], adapted: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    before = frozen_digests(model)
    assert set(before) >= {name for name, _ in model.named_parameters()}
    assert frozen_digests(adapted(model)) == before


def test_a_changed_or_missing_tensor_is_named(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen2")
    before = frozen_digests(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias[0] += 1
    after = frozen_digests(model)
    assert changed_tensors(before, after) == ["model.layers.0.self_attn.q_proj.bias"]
    del after["model.norm.weight"]
    assert "model.norm.weight" in changed_tensors(before, after)
