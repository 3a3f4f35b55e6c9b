"""Conversions are exact: every format to every other and back changes no ΔW, and saving what was loaded gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lorakeet.core.adapter import Adapter
from lorakeet.formats.compare import LIMIT, compare_adapters
from lorakeet.formats.components import with_components, without_component
from lorakeet.formats.detect import detect, read_adapter
from lorakeet.formats.peft import peft
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions
from tiny.adapters import random_adapter
from tiny.models import tiny_model
from tiny.portable import image_adapter, llama_config, text_adapter, transformer_adapter
from tiny.runs import tree

ADAPTERS: dict[str, tuple[Callable[[], Adapter], tuple[str, ...]]] = {
    "text": (lambda: text_adapter(mixed=False), ("peft", "gguf", "mlx")),
    "text mixed": (text_adapter, ("peft", "gguf", "mlx")),
    "text dora": (lambda: text_adapter(dora=True), ("peft", "mlx")),
    "sd1": (image_adapter, ("peft", "kohya", "diffusers")),
    "sd1 unet": (lambda: image_adapter(clip=False), ("peft", "kohya", "diffusers")),
    "sd1 dora": (lambda: image_adapter(dora=True), ("peft", "kohya", "diffusers")),
    "sdxl": (lambda: image_adapter(sdxl=True), ("peft", "kohya", "diffusers")),
    "flux": (lambda: transformer_adapter("flux"), ("peft", "kohya", "diffusers")),
    "sd3": (lambda: transformer_adapter("sd3"), ("peft", "kohya", "diffusers")),
    "experts": (lambda: random_adapter(tiny_model("mixtral"), "gate_up_proj", "down_proj", "q_proj"), ("peft",)),
}
SUFFIX = {"kohya": ".safetensors", "diffusers": ".safetensors", "gguf": ".gguf"}
ROUTES = [(name, first, second) for name, (_, formats) in ADAPTERS.items() for first in formats for second in formats]


def converted(source: Path, to: str, folder: Path, name: str) -> Path:
    """Where the adapter at `source` stands after `lorakeet convert`."""
    out = folder / f"{name}{SUFFIX.get(to, '')}"
    base = llama_config(folder) if to == "gguf" else None
    convert(ConvertOptions(source, out, to=to, base=base), console=Console(quiet=True))  # type: ignore[arg-type]
    assert detect(out).format == to
    return out


def bytes_of(path: Path) -> object:
    return tree(path) if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize(("name", "first", "second"), ROUTES)
def test_every_route_keeps_every_change_of_a_weight(name: str, first: str, second: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[name][0]()
    peft.write(without_component(adapter), tmp_path / "start")
    there = converted(tmp_path / "start", first, tmp_path, "one")
    back = converted(there, second, tmp_path, "two")
    end = with_components(read_adapter(back))
    difference = compare_adapters(adapter, end)
    assert difference.equal, difference
    assert difference.worst <= LIMIT and len({pair.rank for pair in adapter.pairs.values()}) in (1, 3)
    if name.startswith("sd1"):
        assert end.metadata["ss_tag"] == "ä [1]"


@pytest.mark.parametrize(("name", "to"), sorted({(name, first) for name, first, _ in ROUTES}))
def test_saving_what_was_loaded_gives_the_same_bytes(name: str, to: str, tmp_path: Path) -> None:
    peft.write(without_component(ADAPTERS[name][0]()), tmp_path / "start")
    once = converted(tmp_path / "start", to, tmp_path, "once")
    twice = converted(once, to, tmp_path, "twice")
    assert bytes_of(once) == bytes_of(twice)
