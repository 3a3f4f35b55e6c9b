"""Claim: several adapters are combined into their exact weighted sum; PEFT's `linear`, on A and B, gives another adapter.

    python benchmarks/merge_choice.py [RUN_OR_ADAPTER RUN_OR_ADAPTER] [--weights 0.7 0.3] [--steps 20]

Two adapters of one base are combined by each method of PEFT's `add_weighted_adapter` that means a weighted sum, and by
Lorakeet's. The error is ‖found − Σ w·ΔW‖ / ‖Σ w·ΔW‖ over all matrices, in fp64, at the true scales. Without two names, two
runs of the shipped run file are trained that differ in their seed. Errors are no timings: a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness.machine import origin, write_result
from rich.console import Console
from torch import Tensor

from lorakeet.config import read_run
from lorakeet.core.adapter import Adapter
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.peft import peft as peft_format
from lorakeet.merging.combine import CombineSpec, combination
from lorakeet.merging.low_rank import stack_factors, truncate_factors
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.quickstart import config_path

RANKS = (2, 4, 8, 12, 16)
PEFT_METHODS = ("linear", "svd", "cat")
EXACT = 1e-5  # fp32 sums differ by about 1e-7
QUICK = {"data.limit": "200", "evaluate.drift_texts": "0", "evaluate.baselines": "false", "evaluate.resamples": "100"}

Sums = Mapping[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapters", nargs="*", type=Path, help="two run folders or adapters of one base")
    parser.add_argument("--weights", nargs=2, type=float, default=(0.7, 0.3))
    parser.add_argument("--steps", type=int, default=20, help="of each run that is trained here")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    if len(given.adapters) not in (0, 2):
        parser.error(f"expected no or two adapters, got {len(given.adapters)}")
    about = origin()
    with TemporaryDirectory() as folder:
        names = given.adapters or _trained(Path(folder), given.steps)
        adapters = {f"adapter {number}": read_adapter(name) for number, name in enumerate(names)}
        weights = tuple(given.weights)
        errors, compressed = measure(adapters, weights, Path(folder))
    print(f"\nweights {weights[0]} and {weights[1]}: relative error to the exact sum of the changes")
    for name, error in errors.items():
        print(f"{name:32} {error:.2e}")
    print("\nre-compressed to rank: relative error")
    for rank, error in compressed.items():
        print(f"{rank:32} {error:.4f}")
    print(f"\nQR and core SVD over whole SVD, a matrix (not in the result): {_speed(adapters, weights):,.0f} times faster")
    kept = errors["lorakeet linear"] < EXACT and errors["lorakeet cat"] < EXACT < errors["peft linear"]
    print(f"Lorakeet's sum is exact and PEFT's linear is not: {'yes' if kept else 'NO'}")
    ranks = {name: sorted({pair.rank for pair in adapter.pairs.values()}) for name, adapter in adapters.items()}
    trained = None if given.adapters else given.steps
    content = {"weights": weights, "ranks": ranks, "steps": trained, "errors": errors, "error_by_rank": compressed, "kept": kept}
    print(f"Written: {write_result('merge_choice', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


def measure(
    adapters: Mapping[str, Adapter], weights: tuple[float, ...], folder: Path
) -> tuple[dict[str, float], dict[int, float]]:
    """The error of each method of PEFT and of Lorakeet, and Lorakeet's by rank."""
    exact: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters.values(), weights, strict=True):
        for path, pair in adapter.pairs.items():
            change = pair.delta().double() * weight
            exact[path] = exact[path] + change if path in exact else change
    errors = {f"peft {name}": value for name, value in _with_peft(adapters, weights, exact, folder).items()}
    for method in ("linear", "cat", "svd"):
        found = combination(adapters, CombineSpec(method, weights)).combined().adapter
        errors[f"lorakeet {method}"] = _error(lambda path, found=found: found.pairs[path].delta(), exact)
    by_rank = {}
    for rank in RANKS:
        found = combination(adapters, CombineSpec("linear", weights, rank=rank)).combined().adapter
        by_rank[rank] = _error(lambda path, found=found: found.pairs[path].delta(), exact)
    return errors, by_rank


def _error(change: Callable[[str], Tensor], exact: Sums) -> float:
    lost = sum(float((change(path).double() - wanted).square().sum()) for path, wanted in exact.items())
    return float((lost / sum(float(wanted.square().sum()) for wanted in exact.values())) ** 0.5)


def _with_peft(
    adapters: Mapping[str, Adapter], weights: tuple[float, ...], exact: Sums, folder: Path
) -> dict[str, float]:
    """The error of PEFT's methods, by its own loading, combining and get_delta_weight."""
    from peft import PeftModel

    places = []
    for number, adapter in enumerate(adapters.values()):
        places.append(folder / f"peft-{number}")
        peft_format.write(adapter, places[-1])
    base = next(iter(adapters.values())).base
    model = load_text_model(ModelSpec(path=base, dtype="float32"), say=lambda said: None).model
    wrapped = PeftModel.from_pretrained(model, places[0], adapter_name="0")
    wrapped.load_adapter(places[1], adapter_name="1")
    layers = wrapped.base_model.model
    errors = {}
    for method in PEFT_METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped.add_weighted_adapter(["0", "1"], list(weights), method, combination_type=method)
        errors[method] = _error(lambda path, name=method: layers.get_submodule(path).get_delta_weight(name).detach(), exact)
    return errors


def _speed(adapters: Mapping[str, Adapter], weights: tuple[float, ...]) -> float:
    """The median over some matrices of the time of a whole SVD of ΔW over that of the small one."""
    first = next(iter(adapters.values()))
    ratios = []
    for path in list(first.pairs)[:7]:
        pairs = [adapter.pairs[path] for adapter in adapters.values()]
        A, B = stack_factors([(pair.A, pair.B, pair.scale * weight) for pair, weight in zip(pairs, weights, strict=True)])
        took = []
        for work in (lambda A=A, B=B: torch.linalg.svd(B @ A, full_matrices=False), lambda A=A, B=B: truncate_factors(A, B, 8)):
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
        ratios.append(took[0] / took[1])
    return statistics.median(ratios)


def _trained(folder: Path, steps: int) -> list[Path]:
    """Two short runs of the shipped run file with other seeds."""
    found = []
    for seed in (0, 1):
        flags = {**QUICK, "train.steps": str(steps), "train.seed": str(seed), "out": str(folder / f"run-{seed}")}
        finetune(read_run(config_path(), flags), console=Console(stderr=True))
        found.append(folder / f"run-{seed}")
    return found


if __name__ == "__main__":
    sys.exit(main())
