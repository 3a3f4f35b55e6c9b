"""Block maxima of several NF4 weights in three launches: the bits of each weight alone, and never those of other buffers.

bitsandbytes' operators run on the CPU here, which stands for a GPU.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.kernels import bitsandbytes_nf4, choose, nf4_maxima
from lorakeet.kernels.nf4_maxima import LAST, LAUNCHES, MOST, NESTED, MaximaCodes, decoded_bytes
from lorakeet.quant.nf4 import Nf4Base, decode_maxima_together

SHAPES = ((96, 320), (64, 320), (32, 96), (128, 1024))  # 480, 320, 48 and 2,048 blocks: 48 and 320 end within a scale
QUIET = {"view", "slice", "expand", "detach", "unsqueeze", "empty", "alias", "_unsafe_view"}


class Counted(TorchDispatchMode):
    """The operations by name that a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        self.names[name] += name not in QUIET
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU stands for a GPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra lorakeet[cuda], is not installed")
    import bitsandbytes  # noqa: F401

    def into(a: Tensor, absmax: Tensor, block: int, kind: str, shape: list[int], dtype: torch.dtype, out: Tensor) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(a, absmax, block, kind, shape, dtype))

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit.out", into, "CPU")
    monkeypatch.setattr(bitsandbytes_nf4, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(choose, "CANDIDATES", {})
    for known in (bitsandbytes_nf4.AGREED, nf4_maxima.AGREED, LAST):
        known.clear()
    yield
    for known in (bitsandbytes_nf4.AGREED, nf4_maxima.AGREED, LAST):
        known.clear()
    library._destroy()


def weights(seed: int = 0) -> list[Nf4Base]:
    draw = torch.Generator().manual_seed(seed)
    return [Nf4Base.of(torch.randn(shape, generator=draw) * 0.02 * (1 + number)) for number, shape in enumerate(SHAPES)]


def empty(bases: list[Nf4Base]) -> list[Tensor]:
    return [torch.zeros(base.shape, dtype=torch.bfloat16) for base in bases]


def unpacked(bases: list[Nf4Base]) -> list[Tensor]:
    found = empty(bases)
    assert all(bitsandbytes_nf4.dequantise_into(base, out, 0) for base, out in zip(bases, found, strict=True))
    return found


def launched(bases: list[Nf4Base]) -> Counter[str]:
    matrices = empty(bases)
    with Counted() as counted:
        for base, out in zip(bases, matrices, strict=True):
            assert bitsandbytes_nf4.dequantise_into(base, out, 0)
    return counted.names


def test_each_weight_has_the_bits_that_it_has_alone(gpu: None) -> None:
    bases = weights()
    alone = unpacked(bases)
    decode_maxima_together(bases)
    assert all(base.shared is not None for base in bases)
    for order in (bases, bases[::-1]):
        for base, found in zip(order, unpacked(order), strict=True):
            assert torch.equal(found, alone[bases.index(base)])
    formula = [base.unpack_by_torch(torch.zeros(base.shape, dtype=torch.bfloat16), 0) for base in bases]
    assert all(torch.equal(one, other) for one, other in zip(alone, formula, strict=True))


def test_launches(gpu: None) -> None:
    """One for each weight, and three for the maxima of all; alone each weight takes three."""
    bases = weights()
    unpacked(bases)  # proves
    assert launched(bases).total() == 3 * len(bases)
    decode_maxima_together(bases)
    unpacked(bases)
    LAST.clear()
    found = launched(bases)
    assert found.total() == len(bases) + LAUNCHES, found
    assert found["cat"] == found["dequantize_blockwise"] == found["add_"] == 1 and found["dequantize_4bit"] == len(bases)
    assert launched(bases[::-1]).total() == len(bases), "the backward pass of the last block"


def test_those_of_one_block_at_a_time_are_in_memory(gpu: None) -> None:
    one, other = weights(1), weights(2)
    decode_maxima_together(one)
    decode_maxima_together(other)
    expected = [unpacked(one), unpacked(other)]
    for _ in range(2):
        for bases, numbers in zip((one, other), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(unpacked(bases), numbers, strict=True))
            assert len(LAST) == 1
    (kept,) = LAST.values()
    assert kept.nbytes == decoded_bytes([base.absmax.numel() for base in other])
    del one, other, bases
    gc.collect()
    assert not LAST, "nothing is kept of a model that is gone"


def test_more_than_a_launch_joins_are_several(gpu: None) -> None:
    bases = [Nf4Base.of(torch.randn(8, 64)) for _ in range(MOST + 3)]
    decode_maxima_together(bases)
    assert len({id(base.shared[0]) for base in bases if base.shared}) == 2
    assert decoded_bytes([8] * len(bases)) == 4 * NESTED * MOST


def test_a_weight_that_was_changed_decodes_its_own(gpu: None) -> None:
    bases = weights()
    decode_maxima_together(bases)
    unpacked(bases)
    bases[1].store(torch.randn(SHAPES[1], generator=torch.Generator().manual_seed(7)))
    expected = bases[1].unpack_by_torch(torch.zeros(SHAPES[1], dtype=torch.bfloat16), 0)
    assert torch.equal(unpacked(bases)[1], expected)
    moved = bases[2].to("cpu")
    moved.shared = bases[3].shared  # whatever it is told
    assert torch.equal(unpacked([moved])[0], moved.unpack_by_torch(torch.zeros(SHAPES[2], dtype=torch.bfloat16), 0))
    assert weights()[0].to("cpu").shared is None


def test_a_copy_has_the_same_numbers(gpu: None) -> None:
    bases = weights()
    decode_maxima_together(bases)
    before = unpacked(bases)
    copies = copy.deepcopy(bases)
    copies[0].packed.zero_()
    assert all(torch.equal(a, b) for a, b in zip(unpacked(copies)[1:], before[1:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(unpacked(bases), before, strict=True))


def test_what_is_not_joined(gpu: None) -> None:
    """Maxima that are numbers already, and parts of a weight."""
    plain = Nf4Base.of(torch.randn(8, 64), double_quant=False)
    assert plain.maxima_codes() is None
    bases = [plain, *weights()]
    decode_maxima_together(bases)
    assert plain.shared is None and bases[1].shared is not None
    whole, part = (bases[4].nf4_codes(0, rows) for rows in (128, 64))
    assert whole is not None and whole.decoded is not None and part is not None and part.decoded is None
    with torch.inference_mode():
        made = Nf4Base.of(torch.randn(8, 64))
    assert made.maxima_codes() is None, "whose changes leave no trace"


def test_maxima_that_differ_are_said_once_and_not_used(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bases = weights()
    alone = unpacked(bases)
    right = nf4_maxima.SharedMaxima.decode
    monkeypatch.setattr(nf4_maxima.SharedMaxima, "decode", lambda self: right(self).roll(1))
    decode_maxima_together(bases)
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(unpacked(bases), alone, strict=True))
    (record,) = caplog.records
    assert "decodes the block maxima of 4 NF4 weights otherwise" in record.getMessage()


def test_codes_name_their_buffers() -> None:
    base = weights()[0]
    assert base.maxima_codes() == MaximaCodes(base.absmax, base.scales, base.mean)
