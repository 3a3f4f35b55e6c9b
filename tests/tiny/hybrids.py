"""Small models whose layers pass states on, with two adapters, and what transformers and PEFT write with them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft as real_peft
import torch
from torch import Tensor

from lorakeet.formats.peft import peft
from lorakeet.models.inject import adapter_of, trained_parameters
from lorakeet.models.text.serving import ServingModel
from tiny.family_columns import in_transformers, loaded, saved, with_pairs

HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "lfm2", "lfm2_moe", "falcon_h1", "nemotron_h")
OTHERS = ("bamba", "lfm3", "lara_mini", "olmo_hybrid")  # less often trained; the second and third have windows
# Around a convolution's length, around a chunk of linear attention, and what is cut into several chunks of a prompt.
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 17)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[tuple[int, ...]]:
    """Prompts of ordinary tokens, one of each length."""
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(4, 300, (count,), generator=generator).tolist()) for count in lengths]


@dataclass
class Hybrid:
    """A small model on disk, live with the adapters a and b, and by transformers and PEFT with each of them."""

    folder: Path
    live: ServingModel
    own: dict[str, Any]

    def logits(self, ids: Sequence[int], adapter: str = "") -> Tensor:
        """The logits after each token of a text, by transformers' code and without a cache."""
        with torch.no_grad():
            logits: Tensor = self.own[adapter](input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def reply(self, ids: Sequence[int], adapter: str, tokens: int) -> list[int]:
        """What transformers' generate writes greedily, without the end token."""
        with torch.no_grad():
            given = {"input_ids": torch.tensor([ids]), "pad_token_id": 0}
            found = self.own[adapter].generate(**given, max_new_tokens=tokens, do_sample=False)
        written = [int(number) for number in found[0, len(ids) :]]
        return written[:-1] if written[-1] == 2 else written


def hybrid(kind: str, folder: Path) -> Hybrid:
    """A small model of this type, with two adapters that change what it writes."""
    saved(kind, folder)
    text = with_pairs(loaded(folder), folder)
    live, own = ServingModel(loaded(folder)), {"": in_transformers(folder / "model")}
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        for parameter in trained_parameters(text.model).values():
            parameter.data.normal_(0, 0.15, generator=generator)
        peft.write(adapter_of(text.model, base=str(folder / "model")), folder / name)
        live.attach(name, peft.read(folder / name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own[name] = real_peft.PeftModel.from_pretrained(in_transformers(folder / "model"), folder / name).eval()
    return Hybrid(folder, live, own)
