"""Laws of every packed base × {LoRA, DoRA} × dtype: results and gradients are those of the dense dequantised base, and nothing of
W's size is kept for the backward pass.

Both sides run the same products over the same numbers, so they agree to rounding: 1e-5 of the largest value in fp32 (64-term
sums), 2⁻⁶ in bf16, as the weight is rounded to bf16 once on either side. A base is one line in BASES.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.dora import DoraPair
from lorakeet.core.fused.mlp_and_norm import GatedMlp
from lorakeet.core.layers.linear import LoraLinear, new_pair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.core.scratch import SCRATCH
from lorakeet.quant.fp8 import Fp8Base
from lorakeet.quant.gguf import BLOCK_TYPES
from lorakeet.quant.gguf_codes import fit_gguf_scales
from lorakeet.quant.gptq import GptqBase, ZeroFormat
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base, dequantise_blocks
from lorakeet.quant.packed import PackedBase, PackedLinear
from tiny.adapters import random_pair

OUT, IN, TOKENS = 256, 512, 5  # rows and columns that GGUF's blocks of 256 divide
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}

# How far `store` moves what was unpacked, as a share of the largest weight, and ‖W − W′‖ / ‖W‖. Two bits: half a step is a third.
MOVED, COARSE = (0.16, 0.12), {2: (0.34, 0.9), 3: (0.16, 0.32), 4: (0.16, 0.15)}


def gptq_base(weight: Tensor, bits: int, size: int, settings: int) -> GptqBase:
    """GPTQ in groups of `size` columns. The bits of `settings`: asymmetric, groups in any order as desc_act makes them, v2."""
    groups = 1 if size == -1 else weight.shape[1] // size
    zero_format: ZeroFormat = "gptq_v2" if settings & 4 else "gptq"
    base = GptqBase(
        (weight.shape[0], weight.shape[1]), bits=bits, groups=groups, sym=not settings & 1, zero_format=zero_format
    )
    if settings & 2:
        base.g_idx.copy_(base.g_idx[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))])
    base.store(weight)
    return base


def gptq_bases() -> dict[str, Callable[[Tensor], PackedBase]]:
    """Every number of bits with every group size; symmetry, order and zero points such that each pair of settings occurs."""
    found: dict[str, Callable[[Tensor], PackedBase]] = {}
    for i, bits in enumerate((2, 3, 4, 8)):
        for j, size in enumerate((32, 64, 128, -1)):
            settings = 2 * (i ^ j) + ((i >> 1) ^ (j & 1))
            words = [word for bit, word in enumerate(("asymmetric", "desc_act", "v2")) if settings >> bit & 1]
            name = ", ".join([f"gptq, {bits} bits in {size}", *words])
            found[name] = partial(gptq_base, bits=bits, size=size, settings=settings)
    return found


class OwnNf4(Nf4Base):
    """NF4 unpacked by Lorakeet's own code, as where bitsandbytes is missing."""

    def _values(self, packed: Tensor, maxima: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return dequantise_blocks(packed, maxima, self.block_size)[:count]


def fp8_of(weight: Tensor, *, block: tuple[int, int]) -> Fp8Base:
    base = Fp8Base((weight.shape[0], weight.shape[1]), block)
    base.store(weight)
    return base


# What makes a base of a weight (out, in); a new way of packing is one line here.
BASES: dict[str, Callable[[Tensor], PackedBase]] = {
    "nf4": Nf4Base.of,
    "nf4, our own code": OwnNf4.of,
    "nf4, plain scales": lambda weight: Nf4Base.of(weight, double_quant=False),
    "nf4, blocks of 128": lambda weight: Nf4Base.of(weight, block_size=128),
    "int8": Int8Base.of,
    **{f"fp8, blocks of {rows} × {columns}": partial(fp8_of, block=(rows, columns)) for rows, columns in ((1, IN), (32, 16))},
    **gptq_bases(),
    **{f"gguf, {kind}": partial(fit_gguf_scales, kind=kind) for kind in BLOCK_TYPES},
}
every_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_variant = pytest.mark.parametrize("variant", ["lora", "dora"])


def weight_of(out: int = OUT, width: int = IN, seed: int = 0) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def packed_layer(base: PackedBase, bias: Tensor | None = None) -> LoraLinear:
    return LoraLinear(PackedLinear(base, bias), base)


def dense_layer(base: PackedBase, dtype: torch.dtype, bias: Tensor | None = None) -> LoraLinear:
    """The same layer over W as plain numbers."""
    module = nn.Linear(base.shape[1], base.shape[0], bias=bias is not None).requires_grad_(False)
    module.weight.copy_(base.dense())
    if bias is not None:
        module.bias.copy_(bias)
    return LoraLinear(module.to(dtype), DenseBase(module))


def put(layer: LoraLinear, variant: str, seed: int = 0) -> LoraPair:
    """A pair of random numbers, active."""
    weight = layer.base.dense().float()
    entry = PlanEntry("q", "linear", (weight.shape[0], weight.shape[1]), 4, 12.0, variant=variant)  # type: ignore[arg-type]
    pair = DoraPair(entry) if variant == "dora" else LoraPair(entry)
    if isinstance(pair, DoraPair):
        pair.measure(weight)
    torch.manual_seed(seed)
    pair.load(random_pair("linear", weight, dora=variant == "dora"))
    layer.attach("a", pair)
    layer.active = "a"
    return pair


def results(layer: nn.Module, x: Tensor, trained: list[nn.Parameter]) -> list[Tensor]:
    """y, ∂L/∂x and the gradient of everything that is trained, for a loss that weighs each output differently."""
    x = x.clone().requires_grad_()
    y = layer(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *trained])]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape and bool(mine.any())
        assert float((mine.float() - other.float()).abs().max() / other.float().abs().max()) <= tolerance


@every_base
@every_variant
@every_dtype
def test_results_and_gradients_are_those_of_the_dense_base(make: Any, variant: str, dtype: torch.dtype) -> None:
    base, bias = make(weight_of()), torch.randn(OUT).to(dtype)
    packed, dense = packed_layer(base, bias), dense_layer(base, dtype, bias)
    x = torch.randn(2, TOKENS, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = (results(layer, x, list(put(layer, variant).parameters())) for layer in (packed, dense))
    assert len(ours) == (5 if variant == "dora" else 4)
    assert_close(ours, theirs, TOLERANCE[dtype])


@every_base
@every_dtype
def test_without_a_pair_too(make: Any, dtype: torch.dtype) -> None:
    base = make(weight_of())
    x = torch.randn(TOKENS, IN).to(dtype)
    assert_close(results(packed_layer(base), x, []), results(dense_layer(base, dtype), x, []), TOLERANCE[dtype])


@every_base
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_products_in_another_dtype_than_the_input(make: Any, products: torch.dtype) -> None:
    base = make(weight_of())
    packed, dense = packed_layer(base), dense_layer(base, products)
    packed.products = dense.products = products
    x = torch.randn(TOKENS, IN).bfloat16()
    ours, theirs = (results(layer, x, list(put(layer, "lora").parameters())) for layer in (packed, dense))
    assert_close(ours, theirs, TOLERANCE[torch.bfloat16])


class Mlp(nn.Module):
    """A gated MLP by the names that the fused one looks for."""

    def __init__(self, make: Callable[[PackedBase], LoraLinear], bases: list[PackedBase]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(make, bases)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


@every_base
@every_dtype
def test_the_fused_mlp_over_packed_bases(make: Any, dtype: torch.dtype) -> None:
    bases = [make(weight_of(OUT, IN, 1)), make(weight_of(OUT, IN, 2)), make(weight_of(IN, OUT, 3))]
    fused = GatedMlp(Mlp(packed_layer, bases), "silu")
    plain = Mlp(lambda base: dense_layer(base, dtype), bases)
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for module, inner in ((fused, fused.original), (plain, plain)):
        layers = [inner.gate_proj, inner.up_proj, inner.down_proj]
        pairs = [put(layer, "lora", seed) for seed, layer in enumerate(layers)]
        found.append(results(module, x, [parameter for pair in pairs for parameter in pair.parameters()]))
    assert_close(*found, TOLERANCE[dtype] * 2)  # three products in a row


def saved_bytes(run: Callable[[], Tensor]) -> list[int]:
    """The size of each tensor that autograd keeps while `run` is computed."""
    found: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run().float().sum().backward()
    return found


@every_base
@every_variant
@every_dtype
def test_nothing_of_the_size_of_w_is_kept_for_the_backward_pass(make: Any, variant: str, dtype: torch.dtype) -> None:
    layer = packed_layer(make(weight_of()))
    put(layer, variant)
    x = torch.randn(TOKENS, IN).to(dtype).requires_grad_()
    kept = saved_bytes(lambda: layer(x))  # type: ignore[no-any-return]
    # x, x·Aᵀ, A, B; for DoRA also y, its gain and the norm: nothing is larger than B (out, rank) or the tokens' rows
    assert kept and max(kept) <= max(OUT * 4, TOKENS * OUT, TOKENS * IN, IN * 4) * 4
    assert sum(kept) < OUT * IN * dtype.itemsize / 2


@every_base
def test_one_buffer_serves_all_bases(make: Any) -> None:
    SCRATCH.clear()
    layers = [packed_layer(make(weight_of(seed=seed))) for seed in range(4)]
    for layer in layers:
        put(layer, "dora")
    x = torch.randn(TOKENS, IN, requires_grad=True)
    y = torch.stack([layer(x).sum() for layer in layers]).sum()
    y.backward()
    assert [buffer.numel() for buffer in SCRATCH._buffers.values()] == [OUT * IN]


@every_base
def test_some_rows_are_unpacked_as_they_are_within_the_whole(make: Any) -> None:
    rows = 2 * make(weight_of()).row_step  # two parts, so that one begins within W
    base = make(torch.cat([weight_of(seed=seed) for seed in range(-(-rows // OUT))]))
    whole, step = base.dense(), base.row_step
    parts = [slice(start, min(start + step, len(whole))) for start in range(0, len(whole), step)]
    assert len(parts) >= 2
    for part in parts:
        assert torch.equal(base.unpack(torch.empty(part.stop - part.start, IN), part.start), whole[part])


@every_base
@pytest.mark.parametrize("start", ["kaiming", "orthogonal", "pissa", "olora"])
def test_every_start_leaves_the_function_as_it_was(make: Any, start: str) -> None:
    layer = packed_layer(make(weight_of()))
    x = torch.randn(TOKENS, IN)
    before = layer(x)
    entry = PlanEntry("q", "linear", (OUT, IN), 4, 12.0, start=start)  # type: ignore[arg-type]
    layer.attach("a", new_pair(entry, weight=layer.base.dense, seed=0))
    layer.active = "a"
    assert float((layer(x).detach() - before).abs().max() / before.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", [name for name in BASES if name not in ("gguf, Q4_K", "gguf, Q5_K", "gguf, Q6_K")])
def test_storing_what_was_unpacked_changes_little_and_is_stable(name: str) -> None:
    """store(dense()) is within the base's own error: half the widest step between levels (NF4: 0.152 of a block's maximum)."""
    base = BASES[name](weight_of())
    once = base.dense()
    base.store(once)
    moved, error = COARSE.get(base.bits, MOVED) if isinstance(base, GptqBase) else MOVED
    assert float((base.dense() - once).abs().max()) <= moved * float(once.abs().max())
    assert (base.dense() - weight_of()).norm() / weight_of().norm() <= error
