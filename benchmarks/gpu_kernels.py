"""Claim: on a GPU, Lorakeet's Triton kernels dequantise GPTQ faster than torch; and up to how many tokens a fused product pays.

    python benchmarks/gpu_kernels.py [--shapes 8B] [--bases dense nf4 gptq4 gptq8] [--tokens 1 16 64 1024] [--peft]

**Never run: no GPU was available.** Without a CUDA device it says so and ends with exit code 2.

Layers of Llama's 7B and 8B shapes, random weights, rank 16, bf16. Ways to compute y = x·Wᵀ + s·x·Aᵀ·Bᵀ, and from ∂y the gradients
of x, A and B, all but the last through the same public function:

    torch      without the kernels: torch's operations, or bitsandbytes' kernel for NF4 if it is installed
    once       W dequantised by the kernel, then cuBLAS; NF4 as in torch, by bitsandbytes
    fused      one kernel: W dequantised tile by tile within the product
    peft       PEFT's LoRA layer over nn.Linear, or over bitsandbytes' Linear4bit (with --peft)

The ways alternate within a round, and their order rotates from round to round. Each cycles through copies of its weight that
together are larger than any GPU's cache, so that W is read from memory as in a model. The GPU's rate is that of its fastest plain
bf16 product, measured in the same process; the share of it counts the products' FLOPs alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.device_clock import rate, seconds
from harness.machine import origin, write_result
from harness.processes import rotated
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.lowrank import low_rank_linear
from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.kernels.triton.support import why_not_on
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.nf4 import Nf4Base

SHAPES = {  # (out, in)
    "7B": {"attention": (4096, 4096), "gate and up": (11008, 4096), "down": (4096, 11008)},
    "8B": {"q and o": (4096, 4096), "k and v": (1024, 4096), "gate and up": (14336, 4096), "down": (4096, 14336)},
}
BASES = ("dense", "nf4", "gptq4", "gptq8")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
WAYS: dict[str, TritonRequest | None] = {"torch": None, "once": TritonRequest(0), "fused": TritonRequest(1 << 30)}
RANK, SCALE, GROUP = 16, 2.0, 128
CACHE = 256 << 20  # bytes: more than the level-two cache of any GPU


@dataclass(frozen=True)
class Case:
    """One layer, kept one way, for so many tokens."""

    model: str
    layer: str
    shape: tuple[int, int]
    base: str
    tokens: int

    def flops(self, *, backwards: bool) -> int:
        """Of the products: x·Wᵀ, x·Aᵀ and ·Bᵀ; backwards as many again for ∂x, and both factors' gradients."""
        out, width = self.shape
        pair = 2 * self.tokens * RANK * (out + width)
        once = 2 * self.tokens * out * width + pair
        return 2 * once + pair if backwards else once


def cases(given: argparse.Namespace) -> Iterator[Case]:
    for model in given.shapes:
        for (layer, shape), base, tokens in itertools.product(SHAPES[model].items(), given.bases, given.tokens):
            yield Case(model, layer, shape, base, tokens)


def random_base(kind: str, shape: tuple[int, int], device: torch.device) -> Any:
    """A frozen weight of random numbers; packed ones are packed bytes at random, whose grid is that of a real layer."""
    if kind == "dense":
        module = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
        return DenseBase(module)
    if kind == "nf4":
        base: Any = Nf4Base(shape, device=device)
        base.packed.random_(0, 256)
        base.absmax.random_(0, 256)
        base.scales.fill_(0.02)
        base.mean.fill_(0.05)
        return base
    base = GptqBase(shape, bits=int(kind.removeprefix("gptq")), groups=math.ceil(shape[1] / GROUP), device=device)
    base.qweight.random_(-(1 << 31), (1 << 31) - 1)
    base.qzeros.random_(-(1 << 31), (1 << 31) - 1)
    base.scales.fill_(0.01)
    return base


def peft_layer(kind: str, shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """PEFT's LoRA layer of the same shape, rank and scale."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    if kind == "nf4":
        import bitsandbytes

        holder.layer = bitsandbytes.nn.Linear4bit(
            shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
        )
        holder.to(device)
        holder.is_loaded_in_4bit = True  # type: ignore[assignment] # what PEFT asks a model
    else:
        holder.layer = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
    settings = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["layer"], init_lora_weights=False)
    layer: Any = inject_adapter_in_model(settings, holder).layer
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(device, torch.bfloat16)
    return layer  # type: ignore[no-any-return]


def actions(case: Case, device: torch.device, *, with_peft: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """x to y by each way; repeated calls cycle through copies of the weight."""
    out, width = case.shape
    first = random_base(case.base, case.shape, device)
    size = first.weight.nbytes if isinstance(first, DenseBase) else first.bytes
    bases = [first, *(random_base(case.base, case.shape, device) for _ in range(CACHE // size))]
    A = torch.randn(RANK, width, device=device, dtype=torch.bfloat16).requires_grad_()
    B = torch.randn(out, RANK, device=device, dtype=torch.bfloat16).requires_grad_()

    def through(kernels: TritonRequest | None) -> Callable[[Tensor], Tensor]:
        turn = itertools.cycle(bases)

        def action(x: Tensor) -> Tensor:
            base = next(turn)
            base.kernels = kernels
            return low_rank_linear(x, base, (A, B, SCALE))

        return action

    found = {way: through(kernels) for way, kernels in WAYS.items() if (case.base, way) != ("dense", "once")}
    if with_peft and case.base in ("dense", "nf4"):
        layers = itertools.cycle([peft_layer(case.base, case.shape, device) for _ in bases])

        def by_peft(x: Tensor) -> Tensor:
            return next(layers)(x)

        found["peft"] = by_peft
    return found


def measure(case: Case, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a call by each way, forwards and there and back: medians over the rounds."""
    by_way = actions(case, device, with_peft=given.peft)
    plain = torch.randn(case.tokens, case.shape[1], device=device, dtype=torch.bfloat16)
    leaf = plain.clone().requires_grad_()
    grad = torch.randn(case.tokens, case.shape[0], device=device, dtype=torch.bfloat16)

    def forwards(way: str) -> object:
        with torch.no_grad():
            return by_way[way](plain)

    def both(way: str) -> object:
        leaf.grad = None
        return by_way[way](leaf).backward(grad)  # type: ignore[no-untyped-call]

    taken: dict[str, dict[str, list[float]]] = {way: {"forwards": [], "both": []} for way in by_way}
    for number in range(given.rounds + 1):
        for way in rotated(list(by_way), number):
            for name, action in (("forwards", forwards), ("both", both)):
                found = seconds(lambda action=action, way=way: action(way), given.repeats)  # type: ignore[misc]
                if number:  # in the first round the kernels are compiled
                    taken[way][name].append(found)
    return {way: {name: statistics.median(values) for name, values in names.items()} for way, names in taken.items()}


def show(case: Case, found: dict[str, Any], peak: float) -> None:
    named = f"{case.model} {case.layer:12} {case.base:6} {case.tokens:6}"
    for way, times in found.items():
        forwards, both = times["forwards"], times["both"]
        of_rate = [case.flops(backwards=backwards) / time / peak for backwards, time in ((False, forwards), (True, both))]
        print(f"{named}  {way:6} {forwards * 1e6:10.1f} {of_rate[0]:6.1%} {both * 1e6:10.1f} {of_rate[1]:6.1%}", flush=True)


def crossings(rows: Sequence[tuple[Case, dict[str, Any]]]) -> dict[str, int]:
    """For each kind of weight, up to how many tokens the fused kernel is the fastest of Lorakeet's ways, in every layer."""
    found: dict[str, int] = {}
    for base in dict.fromkeys(case.base for case, _ in rows):
        best = 0
        for tokens in sorted({case.tokens for case, _ in rows}):
            here = [times for case, times in rows if (case.base, case.tokens) == (base, tokens)]
            if not all(min(WAYS.keys() & times, key=lambda way: times[way]["both"]) == "fused" for times in here):
                break
            best = tokens
        found[base] = best
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20, help="calls in a row, which are timed together")
    parser.add_argument("--peft", action="store_true", help="PEFT's layers beside Lorakeet's (pip install peft bitsandbytes)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    reason = "" if torch.cuda.is_available() else "torch sees no CUDA device here"
    reason = reason or why_not_on(torch.device("cuda"))
    if reason:
        print(f"Nothing was measured: {reason}. This benchmark needs a CUDA device.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device, about = torch.device("cuda"), origin()
    peak, gpu = rate(device), torch.cuda.get_device_name()
    print(f"{gpu}: {peak / 1e12:.0f} TFLOP/s in bf16. Microseconds, and the share of that rate.")
    print(f"{'layer':16} {'weight':6} {'tokens':>6}  {'way':6} {'forwards':>10} {'share':>6} {'and back':>10} {'share':>6}")
    rows = []
    for case in cases(given):
        rows.append((case, measure(case, device, given)))
        show(*rows[-1], peak)
    fused = crossings(rows)
    print("Fused is the fastest in every layer up to (tokens): " + ", ".join(f"{base} {most}" for base, most in fused.items()))
    packed = [times for case, times in rows if case.base != "dense"]
    slower = [times for times in packed if min(times["once"]["both"], times["fused"]["both"]) > times["torch"]["both"]]
    measured = [{**vars(case), "seconds": times} for case, times in rows]
    content = {"card": gpu, "rate": peak, "fused_up_to": fused, "cases": measured}
    print(f"Written: {write_result('gpu_kernels', content, seed=0, about=about, folder=given.results)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
