"""A run over the tiny Llama whose adapter has a visible effect, and what becomes of it: GGUF files, folders, LoRA files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from lorakeet.core.adapter import Adapter
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.identity import BASE, identity_of
from lorakeet.formats.peft import peft
from lorakeet.merging.merged_folder import merge_into
from lorakeet.models.text.load import load_tokenizer
from lorakeet.serve.probe import FACT


def loud_run(run: Path, out: Path, *, seed: int = 0) -> Path:
    """A copy of a run whose B are random numbers of noticeable size: rank 4 and alpha 12, as in the run itself."""
    shutil.copytree(run, out)
    held = peft.read(out / "adapter")
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: dataclasses.replace(pair, B=0.2 * torch.randn(pair.B.shape, generator=generator))
        for path, pair in held.pairs.items()
    }
    shutil.rmtree(out / "adapter")
    peft.write(Adapter(pairs, base=held.base), out / "adapter")
    certified_anew(out)
    return out


def certified_anew(run: Path) -> None:
    """Makes the certificate of a run one of the adapter that is there now, without the probe of the one before."""
    held = read_certificate(run / "certificate.json")
    base = {name: value for name, value in held.identity.items() if name.startswith(BASE)}
    facts = {name: value for name, value in held.facts.items() if name != FACT}
    dataclasses.replace(held, facts=facts, identity={**identity_of(run / "adapter"), **base}).write(run / "certificate.json")


def write_model(base: Path, adapter: Adapter | None, out: Path, quant: str = "f32", **more: Any) -> Path:
    """A GGUF model of `base` with `adapter` folded in."""
    return write_gguf(base, adapter, out, tokenizer=more.pop("tokenizer", load_tokenizer(base)), quant=quant, **more).path


def write_lora(base: Path, adapter: Adapter, out: Path) -> Path:
    """The GGUF adapter."""
    gguf.write(adapter, out, base=open_base(base))
    return out


def write_folder(base: Path, adapter: Adapter, out: Path) -> Path:
    """The merged folder."""
    return merge_into(base, adapter, out).folder
