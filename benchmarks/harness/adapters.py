"""Random adapters on disk for a model: all linear layers of its blocks, A and B both far from zero."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.formats.peft import peft
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model


def shapes_of(model: str) -> tuple[Path, dict[str, tuple[int, int]]]:
    """The folder that `model` lies in, and (out, in) of every linear layer but the head."""
    text = load_text_model(ModelSpec(path=model, dtype="float32"), say=lambda _: None)
    head = text.model.get_output_embeddings()
    linear = {path: module for path, module in text.model.named_modules() if isinstance(module, torch.nn.Linear)}
    return text.source, {path: tuple(module.weight.shape) for path, module in linear.items() if module is not head}


def write_adapters(
    folder: Path, shapes: dict[str, tuple[int, int]], count: int, *, rank: int, leaves: tuple[str, ...] = (), base: str = ""
) -> list[Path]:
    """`count` adapters in PEFT's layout, each from a seed of its own; `leaves` are the layers' last names, all without."""
    written = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pairs = {}
        for path, (rows, columns) in shapes.items():
            if leaves and path.rpartition(".")[2] not in leaves:
                continue
            A = torch.randn(rank, columns, generator=generator) / columns**0.5
            pairs[path] = Pair(A, torch.randn(rows, rank, generator=generator) * 0.02, 2.0 * rank)
        written.append(folder / f"a{number:04}")
        peft.write(Adapter(pairs, base=base), written[-1])
    return written
