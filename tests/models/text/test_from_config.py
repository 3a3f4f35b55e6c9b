"""Models from configurations alone: published shapes with their published sizes, and packed layers as a loaded model has them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lorakeet.core.scratch import SCRATCH
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.kernels import choose
from lorakeet.kernels.cpu import dense
from lorakeet.kernels.cpu.int8_rows import outliers_of
from lorakeet.memory.ledger import Ledger
from lorakeet.memory.store import LINE
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import (
    ShapeBase,
    config_from_settings,
    config_of,
    model_from_config,
    published_configs,
    streamed_model_from_config,
)
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.planning.rehearse_text import STEP, Rehearsal, RowShape, rehearse
from lorakeet.quant.construct import weights_in
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import Way
from lorakeet.train.spec import TrainSpec
from tiny.models import save_tiny_llama, tiny_model
from tiny.native import needs_native
from tiny.streams import loaded

PARAMETERS = {  # as the model cards and the weights' indices say
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}
SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def quiet(_: str) -> None:
    return None


@pytest.mark.slow
def test_every_published_shape_has_its_published_size() -> None:
    assert set(published_configs()) == set(PARAMETERS)
    for name, expected in PARAMETERS.items():
        config = config_of(ModelSpec(path=name.upper()), quiet)  # hub ids do not heed case
        with Ledger():
            text = model_from_config(config, name=name, dtype=torch.bfloat16, products=torch.float32)
            assert weights_in(text.model) == expected, name


def test_an_outline_draws_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What draws until numbers fit, as vision towers do, would never end on shapes."""
    drawn: list[tuple[int, ...]] = []
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *_, **__: drawn.append(tuple(tensor.shape)) or tensor)
    with Ledger():
        config = config_from_settings({**SMALL, "tie_word_embeddings": True})
        text = model_from_config(config, name="tiny", dtype=torch.float32, products=torch.float32)
        assert text.model.lm_head.weight is text.model.model.embed_tokens.weight
    assert drawn == []


def test_what_has_no_configuration_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration.*meta-llama/Llama-2-7b-hf.*Did you mean 'meta-llama/Llama-2-7b-hf'"):
        config_of(ModelSpec(path="meta-llama/Llama-2-7b-hv"), quiet)
    with pytest.raises(ConfigError, match="no configuration"):
        config_of(ModelSpec(path=str(tmp_path)), quiet)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_packed_layers_have_the_bytes_of_the_real_ones(method: str) -> None:
    spec = QuantSpec(method=method)  # type: ignore[arg-type]
    settings = {"name": "small", "dtype": torch.float32, "products": torch.float32, "quantize": spec}
    real = model_from_config(config_from_settings(SMALL), **settings)  # type: ignore[arg-type]
    with Ledger():
        planned = model_from_config(config_from_settings(SMALL), **settings)  # type: ignore[arg-type]
        found = {path: base.bytes for path, base in planned.model.named_modules() if isinstance(base, PackedBase)}
    expected = {path: base.bytes for path, base in real.model.named_modules() if isinstance(base, PackedBase)}
    assert found == expected and len(found) == 14
    assert weights_in(planned.model) == weights_in(real.model)


@pytest.mark.parametrize("in_int8", [False, True])
def test_what_a_product_in_int8_holds_is_in_the_account(in_int8: bool) -> None:
    spec = QuantSpec(method="int8", int8_products=in_int8)
    dtypes: dict[str, Any] = {"dtype": torch.float32, "products": torch.float32}
    tokens = 4096
    with Ledger() as ledger:
        text = model_from_config(config_from_settings(SMALL), name="small", quantize=spec, **dtypes)
        base = next(module for module in text.model.train().modules() if isinstance(module, PackedBase))
        x = torch.zeros(tokens, base.shape[1])
        with ledger.phase("product"):
            assert base.matmul(x).shape == (tokens, base.shape[0])
        held = ledger.peaks["product"].bytes - x.nbytes
    wanted = tokens * base.shape[0] * 8  # the sums in int32, and as fp32
    assert (held >= wanted) is in_int8
    apart = outliers_of(base.shape[1]) if in_int8 else 0  # columns that are multiplied by themselves
    assert ledger.work["product"].flops == 2 * tokens * base.shape[0] * (base.shape[1] + apart)


@needs_native
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_outlined_base_is_multiplied_as_it_is_where_a_run_s_is(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "multiplies", lambda: True)  # also with AMX
    monkeypatch.setattr(choose, "CANDIDATES", {})
    spec = QuantSpec(method=method)
    SCRATCH.clear()
    with Ledger() as ledger:
        text = model_from_config(
            config_from_settings(SMALL), name="small", dtype=torch.bfloat16, products=torch.bfloat16, quantize=spec
        )
        base = next(module for module in text.model.modules() if isinstance(module, ShapeBase))
        x = torch.zeros(3, base.shape[1], dtype=torch.bfloat16)
        with ledger.phase("product"):
            base.matmul(x)
    assert not SCRATCH._buffers
    assert ledger.work["product"].flops == 2 * 3 * base.shape[0] * base.shape[1]


DTYPES = {"dtype": torch.float32, "products": torch.float32}


def rehearsed(config: object, way: Way, batches: int = 2, **changes: object) -> Rehearsal:
    build = ModelBuilder(partial(streamed_model_from_config, name="made-up", **{**DTYPES, **changes}), config)
    return rehearse(build, LoraSpec(rank=2), TrainSpec(), rows=RowShape(32, 2), micro_batches=batches, way=way)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2_moe", "gpt2"])
def test_every_family_is_rehearsed_and_holds_less_than_resident(family: str) -> None:
    config = tiny_model(family).config
    resident = rehearse(
        partial(model_from_config, config, name="made-up", **DTYPES), LoraSpec(rank=2), TrainSpec(), rows=RowShape(32, 2)
    )
    streamed = rehearsed(config, Way(True, together=1, spilled=True))
    assert streamed.plan == resident.plan
    assert streamed.peaks[STEP].bytes < resident.peaks[STEP].bytes
    assert resident.blocks == 0 and streamed.blocks == config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_its_places_are_as_large_as_those_of_the_loaded_model(method: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=5)
    real = loaded(folder, tmp_path / "store", method=method)
    assert real.streamed is not None
    with Ledger() as ledger:
        text = streamed_model_from_config(
            AutoConfig.from_pretrained(folder),
            name="x",
            quantize=QuantSpec(method=method),
            **DTYPES,  # type: ignore[arg-type]
        )
        assert text.streamed is not None
        size, tensors = text.streamed.stream.slot_bytes, len(text.streamed.stream.records[0].tensors)
        assert abs(size - real.streamed.stream.slot_bytes) < LINE * tensors  # they may stand in another order
        before = ledger.bytes
        assert len(text.streamed.stream.fill()) == 2
        assert ledger.bytes - before == 2 * size
