"""States of all random number generators used in training: Python's, NumPy's, torch's, and CUDA's."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seeds every generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def states() -> dict[str, Tensor]:
    """Every generator's state as tensors."""
    version, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    found = {
        "python.words": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.key": torch.from_numpy(np.asarray(key, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # a run on the CPU leaves a GPU alone
        found |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def seeded(seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """The states of torch's generators of the CPU and of `device`, as `torch.manual_seed(seed)` leaves them."""
    return tuple(torch.Generator(each).manual_seed(seed).get_state() for each in (torch.device("cpu"), *cuda_devices(device)))


def drawn(device: torch.device) -> tuple[Tensor, ...]:
    """The current states of the same generators."""
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in cuda_devices(device)))


def draw_from(found: tuple[Tensor, ...], device: torch.device) -> None:
    """Sets them to states from `seeded` or `drawn`."""
    first, *others = found
    torch.set_rng_state(first)
    for each, state in zip(cuda_devices(device), others, strict=True):
        torch.cuda.set_rng_state(state, each)


def cuda_devices(device: torch.device) -> list[torch.device]:
    """[`device`] if it is a CUDA device, which has its own generator; else []."""
    return [device] if device.type == "cuda" else []


def current_cuda_devices() -> list[int]:
    """The current CUDA device if this process uses CUDA; else []. Asking for its generator would take memory of a GPU."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]


def restore(found: Mapping[str, Tensor]) -> None:
    """Sets every generator to the result of `states`; missing CUDA devices are ignored."""
    version, *words = found["python.words"].tolist()
    gauss = found["python.gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = found["numpy.position"].tolist()
    key = found["numpy.key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, found["numpy.gauss"].item()))
    torch.set_rng_state(found["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):  # type: ignore[no-untyped-call]
        if f"cuda.{index}" in found:
            torch.cuda.set_rng_state(found[f"cuda.{index}"], index)
