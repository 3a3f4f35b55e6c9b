"""Compiles the Triton kernels for cards that are not here, and prints what became of them as JSON; `--all` takes some minutes.

    TRITON_INTERPRET=0 python tests/tiny/compiled_kernels.py --all
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorakeet.kernels.tiled_weight import TiledWeight
from lorakeet.kernels.triton import tiles as triton_tiles
from lorakeet.kernels.triton.support import RANK
from lorakeet.kernels.triton.tiles import TilePair, dense_tiles, fused_product, unpack_tiles
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.nf4 import Nf4Base

TARGETS = {"8.0": GPUTarget("cuda", 80, 32), "9.0": GPUTarget("cuda", 90, 32)}
KERNELS = {"_unpack": triton_tiles, "_product": triton_tiles}
SHAPE = (512, 1024)
# Weight, dtype, tokens and card: each kernel and way of keeping a weight once, and the ones that want most of the chip.
CASES = [
    ("nf4", torch.bfloat16, 0, "8.0"), ("nf4", torch.float32, 0, "9.0"),
    ("nf4", torch.bfloat16, 1, "8.0"), ("nf4", torch.bfloat16, 64, "9.0"), ("nf4", torch.float32, 1, "8.0"),
    ("gptq 4", torch.bfloat16, 0, "8.0"), ("gptq 8", torch.float16, 0, "9.0"), ("gptq 3", torch.bfloat16, 0, "8.0"),
    ("gptq 4", torch.float16, 1, "8.0"), ("gptq 3", torch.bfloat16, 64, "9.0"),
    ("dense", torch.bfloat16, 64, "8.0"),
]  # fmt: skip
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Recorder:
    """Stands for a kernel: notes what it is launched with, and launches nothing."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **options: self.calls.append((self.kernel, given, options))


def type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def compiled(kernel: Any, given: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Any:
    """As Triton would compile it at this launch, with pointers to multiples of 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for number, (parameter, value) in enumerate(zip(kernel.params, given, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        places = [(number, part) for part in range(len(value))] if isinstance(value, tuple) else [(number,)]
        for place in places:
            whole = value[place[1]] if isinstance(value, tuple) else value
            if isinstance(whole, torch.Tensor) and whole.dim():
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def weights() -> dict[str, TiledWeight]:
    """A weight of each kind, of shapes alone."""
    bases = {
        "nf4": Nf4Base(SHAPE), "nf4 of large blocks, one scale each": Nf4Base(SHAPE, block_size=256, double_quant=False),
        "gptq 4": GptqBase(SHAPE, bits=4, groups=8), "gptq 8": GptqBase(SHAPE, bits=8, groups=8),
        "gptq 3": GptqBase(SHAPE, bits=3, groups=8),
    }  # fmt: skip
    return {name: tiles for name, base in bases.items() if (tiles := base.in_tiles()) is not None}


def launched(name: str, dtype: torch.dtype, tokens: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What the launchers would launch for a weight of that name: for 0 tokens unpacking, for some of them a product with a pair,
    forwards and of low rank for few, backwards and of the highest rank for many."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    recorders = {kernel: Recorder(getattr(module, kernel), calls) for kernel, module in KERNELS.items()}
    with pytest.MonkeyPatch.context() as patch:
        for kernel, recorder in recorders.items():
            patch.setattr(KERNELS[kernel], kernel, recorder)
        tiles = dense_tiles(torch.empty(SHAPE, dtype=dtype)) if name == "dense" else weights()[name]
        if tokens == 0:
            unpack_tiles(tiles, torch.empty(SHAPE, dtype=dtype))
            return calls[0]
        many = tokens > 16
        rank, (depth, width) = RANK if many else 16, SHAPE if many else SHAPE[::-1]
        pair = TilePair(torch.empty(rank, depth, dtype=dtype), torch.empty(rank, width, dtype=dtype), 1.0, 2.0)
        fused_product(tiles, torch.empty(tokens, depth, dtype=dtype), pair, transposed=many)
    return calls[0]


def main(everything: bool) -> None:
    """Those of CASES, or every kind of weight for every card."""
    cases = CASES
    if everything:
        names, dtypes = [*weights(), "dense"], (torch.bfloat16, torch.float16, torch.float32)
        cases = list(itertools.product(names, dtypes, (0, 1, 64), TARGETS))
    rows = []
    for name, dtype, tokens, card in cases:
        kernel, given, options = launched(name, dtype, tokens)
        made = compiled(kernel, given, options, TARGETS[card])
        ptx = made.asm["ptx"]
        rows.append(
            {
                "weight": name, "dtype": str(dtype), "tokens": tokens, "card": card, "kernel": kernel.__name__,
                "shared": made.metadata.shared, "cubin": len(made.asm["cubin"]),
                "fma": len(re.findall(r"\bfma\.", ptx)), "rounds to nearest": "cvt.rn.bf16" in ptx,
                "tensor cores": "mma.sync" in ptx or "wgmma" in ptx,
            }
        )  # fmt: skip
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main("--all" in sys.argv)
