"""Compiles the Triton kernels, Lorakeet's and liger-kernel's, as they would be launched on GPUs that are not here.

    TRITON_INTERPRET=0 python tests/tiny/compiled_kernels.py [--all] [--table]

Shapes are those of Llama-3.1-8B. As a launch does, it makes constants of whole numbers that are 1, and tells the compiler which
others, and which addresses, are multiples of 16. Prints as JSON what became of each: registers, bytes outside of them, shared
memory, and how many bytes each access of GPU memory moves; `--table` prints it as lines. `--all` takes some ten minutes.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorakeet.kernels import liger
from lorakeet.kernels.triton import tiles as triton_tiles
from lorakeet.kernels.triton.support import RANK
from lorakeet.kernels.triton.tiles import TilePair, dense_tiles, fused_product, unpack_tiles
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.nf4 import Nf4Base

CARDS = {f"{number / 10:.1f}": GPUTarget("cuda", number, 32) for number in (75, 80, 86, 89, 90, 100, 120)}
OWN_CARDS = [card for card in CARDS if card != "7.5"]  # which kernels/triton/support refuses
META = torch.device("meta")
SHAPE = (14336, 4096)  # gate_proj
HIDDEN, INNER, HEADS, HEAD, VOCABULARY, TOKENS = 4096, 14336, 32, 128, 128256, 2048
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Weight, dtype, tokens and card: each kernel and way of keeping a weight once, and the ones that want most of the chip.
CASES: list[tuple[str, torch.dtype, int, str]] = [
    ("gptq 4", BF16, 0, "8.0"), ("gptq 8", FP32, 0, "9.0"), ("nf4", BF16, 64, "9.0"), ("gptq 3", BF16, 0, "8.9"),
    ("gptq 3", BF16, 64, "8.6"), ("gptq 4", FP16, 1, "8.6"), ("dense", BF16, 64, "12.0"),
    ("norm", BF16, TOKENS, "8.0"), ("norm", FP16, TOKENS, "7.5"), ("norm backward", BF16, TOKENS, "9.0"),
    ("gates backward", BF16, TOKENS, "8.9"), ("gelu gates backward", BF16, TOKENS, "12.0"),
    ("rotation", BF16, TOKENS, "8.0"), ("loss", FP32, TOKENS, "8.6"),
]  # fmt: skip
TYPES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands for a kernel: notes what it is launched with, and launches nothing."""

    def __init__(self, kernel: Any, calls: list[Call]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **options: self.calls.append((self.kernel, given, options))


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


WEIGHTS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: Nf4Base(SHAPE, device=META).in_tiles(),
    "nf4 of large blocks, one scale each": lambda: Nf4Base(SHAPE, block_size=256, double_quant=False, device=META).in_tiles(),
    **{f"gptq {bits}": lambda bits=bits: GptqBase(SHAPE, bits=bits, groups=32, device=META).in_tiles() for bits in (3, 4, 8)},
}  # fmt: skip
LIGERS: dict[str, tuple[str, str, Callable[[torch.dtype, int], object]]] = {  # module and kernel, and what launches it
    "norm": ("rms_norm", "_rms_norm_forward_kernel",
             lambda dtype, n: liger.norm(meta(n, HIDDEN, dtype=dtype), meta(HIDDEN, dtype=dtype), 1e-5)),
    "norm backward": ("rms_norm", "_rms_norm_backward_kernel", lambda dtype, n: liger.norm_backward(
        meta(n, HIDDEN, dtype=dtype), meta(n, HIDDEN, dtype=dtype), meta(n, 1, dtype=FP32), meta(HIDDEN, dtype=dtype))),
    "gates": ("swiglu", "_swiglu_forward_kernel", lambda dtype, n: liger.gated(*(meta(n, INNER, dtype=dtype) for _ in "gu"))),
    "gates backward": ("swiglu", "_swiglu_backward_kernel",
                       lambda dtype, n: liger.gated_backward_(*(meta(n, INNER, dtype=dtype) for _ in "gud"))),
    "gelu gates": ("geglu", "_geglu_tanh_forward_kernel",
                   lambda dtype, n: liger.gelu_gated(*(meta(n, INNER, dtype=dtype) for _ in "gu"))),
    "gelu gates backward": ("geglu", "_geglu_tanh_backward_kernel",
                            lambda dtype, n: liger.gelu_gated_backward_(*(meta(n, INNER, dtype=dtype) for _ in "gud"))),
    "rotation": ("rope", "_triton_rope", lambda dtype, n: liger.rotate_(
        meta(n, HEADS, HEAD, dtype=dtype), meta(n, HEAD, dtype=dtype), meta(n, HEAD, dtype=dtype), True)),
    "loss": ("cross_entropy", "liger_cross_entropy_kernel", lambda _, n: liger.loss_in_place(
        meta(n, VOCABULARY, dtype=FP32), meta(n, dtype=torch.int64), wants_grad=True)),
}  # fmt: skip


@contextmanager
def recorded(module: Any, name: str) -> Iterator[list[Call]]:
    """A context in which launches of a kernel are noted."""
    calls: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, Recorder(getattr(module, name), calls))
        yield calls


def launched(name: str, dtype: torch.dtype, tokens: int) -> Call:
    """What would be launched for a weight or an operation of that name.

    Of a weight: for 0 tokens unpacking, for some of them a product with a pair, forwards and of low rank for few, backwards and
    of the highest rank for many.
    """
    if name in LIGERS:
        module, kernel, launch = LIGERS[name]
        with recorded(import_module(f"liger_kernel.ops.{module}"), kernel) as calls, pytest.MonkeyPatch.context() as patch:
            patch.setattr(liger, "gated", lambda *_: None)  # which a backward pass launches first
            patch.setattr(liger, "gelu_gated", lambda *_: None) if name.endswith("backward") else None
            patch.undo() if name in ("gates", "gelu gates") else None
            launch(dtype, tokens)
        return calls[0]
    tiles = dense_tiles(meta(*SHAPE, dtype=dtype)) if name == "dense" else WEIGHTS[name]()
    with recorded(triton_tiles, "_product" if tokens else "_unpack") as calls:
        if tokens == 0:
            unpack_tiles(tiles, meta(*SHAPE, dtype=dtype))
            return calls[0]
        many = tokens > 16
        rank, (depth, width) = RANK if many else 16, SHAPE if many else SHAPE[::-1]
        pair = TilePair(meta(rank, depth, dtype=dtype), meta(rank, width, dtype=dtype), 1.0, 2.0)
        fused_product(tiles, meta(tokens, depth, dtype=dtype), pair, transposed=many)
    return calls[0]


def compiled(kernel: Any, given: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Any:
    """As Triton would compile it at this launch."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, given, strict=False)) | {name: options[name] for name in names if name in options}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for number, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        places = [(number, part) for part in range(len(value))] if isinstance(value, tuple) else [(number,)]
        for place in places:
            whole = value[place[1]] if isinstance(value, tuple) else value
            aligned = whole.dim() > 0 if isinstance(whole, torch.Tensor) else type(whole) is int and whole % 16 == 0
            if aligned:
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={name: each for name, each in options.items() if name not in names})


def type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes that it keeps outside of them."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def accesses(ptx: str) -> dict[str, dict[str, int]]:
    """How many instructions load and store GPU memory, by the bytes that one moves."""
    found: dict[str, Counter[str]] = {"ld": Counter(), "st": Counter()}
    for kind, words in re.findall(r"\b(ld|st)\.global((?:\.[\w:]+)+)", ptx):
        lanes, bits = re.search(r"\.v(\d)", words), re.findall(r"\.[bufs](\d+)", words)
        if bits:
            found[kind][str(int(lanes.group(1) if lanes else 1) * int(bits[-1]) // 8)] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]", ptx):
        found["ld"][str(int(size, 0))] += 1
    return {kind: dict(sorted(counts.items(), key=lambda one: int(one[0]))) for kind, counts in found.items()}


def every_case() -> list[tuple[str, torch.dtype, int, str]]:
    """Every weight and operation, for every card."""
    own = [*itertools.product([*WEIGHTS, "dense"], (BF16, FP16, FP32), (0, 1, 64), OWN_CARDS)]
    theirs = itertools.product([name for name in LIGERS if name != "loss"], (BF16, FP16, FP32), (TOKENS,), CARDS)
    found = [*own, *theirs, *(("loss", FP32, TOKENS, card) for card in CARDS)]
    never = [case for case in own if case[2] == 0 and not case[0].startswith("gptq")]  # which Lorakeet does not dequantise
    return [case for case in found if case not in never and not (case[1] == BF16 and case[3] == "7.5")]


def row(name: str, dtype: torch.dtype, tokens: int, card: str) -> dict[str, Any]:
    """What became of one launch."""
    kernel, given, options = launched(name, dtype, tokens)
    made = compiled(kernel, given, options, CARDS[card])
    ptx = made.asm["ptx"]
    return {
        "triton": triton.__version__, "kernel": kernel.__name__,
        "name": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "card": card,
        "shared": made.metadata.shared, **resources(made.asm["cubin"]), **accesses(ptx),
        "fma": len(re.findall(r"\bfma\.", ptx)), "rounds to nearest": "cvt.rn.bf16" in ptx,
        "tensor cores": any(word in ptx for word in ("mma.sync", "wgmma", "tcgen05.mma")),
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Those of CASES, or all; without liger-kernel only Lorakeet's own."""
    cases = every_case() if "--all" in arguments else CASES
    if importlib.util.find_spec("liger_kernel") is None:
        cases = [case for case in cases if case[0] not in LIGERS]
    rows = []
    for case in cases:
        rows.append(row(*case))
        if "--table" in arguments:
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if "--table" not in arguments:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
