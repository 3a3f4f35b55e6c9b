"""Embeds texts with a sentence encoder, a folder of transformers or of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from lorakeet.data.template import tokenised
from lorakeet.errors import ConfigError
from lorakeet.formats.files.json_object import read_object
from lorakeet.memory.store import CPU
from lorakeet.models.files.foreign_code import read_native

Vectors = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
POOLING = Path("1_Pooling") / "config.json"  # as sentence-transformers writes it
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
TOGETHER = 32  # texts
MOST_TOKENS = 512  # of a text, or as many as the encoder takes


def require_encoder(folder: str | Path) -> Path:
    """The folder of an encoder. Raises ConfigError if it is none, or pools in a way that is not known."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"evaluate.encoder is {str(folder)!r}, which has no config.json; expected the folder of a text encoder, such as a "
            "download of sentence-transformers/all-MiniLM-L6-v2."
        )
    pooling(path)
    return path


def pooling(folder: Path) -> str:
    """"mean" of all tokens, or "cls", the first one, as the folder says; the mean if it says nothing. Raises ConfigError."""
    if not (folder / POOLING).is_file():
        return "mean"
    settings = read_object(folder / POOLING, expected="how an encoder pools")
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise ConfigError(
            f"{folder / POOLING} pools by {', '.join(chosen) or 'nothing'}; expected one of {', '.join(MODES)}. Use another "
            "encoder as evaluate.encoder."
        )
    return MODES[chosen[0]]


def text_embedder(folder: Path) -> Callable[[Sequence[str]], Vectors]:
    """A function from texts to vectors (texts, width) of length 1, in fp32 on the CPU. Code of the folder never runs."""
    model = read_native(AutoModel, folder, local_files_only=True, dtype=torch.float32).to(CPU).eval()
    tokenizer = read_native(AutoTokenizer, folder, local_files_only=True)
    mode = pooling(folder)
    longest = min(MOST_TOKENS, int(getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def embed(texts: Sequence[str]) -> Vectors:
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        found: dict[int, Any] = {}
        for start in range(0, len(order), TOGETHER):
            chosen = order[start : start + TOGETHER]
            settings = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
            batch = tokenised(tokenizer, [texts[number] for number in chosen], **settings)
            with torch.no_grad():
                states = model(**batch).last_hidden_state  # (texts, tokens, width)
            mask = batch["attention_mask"][:, :, None].to(states.dtype)
            pooled = states[:, 0] if mode == "cls" else (states * mask).sum(1) / mask.sum(1).clamp_min(1)
            found |= dict(zip(chosen, torch.nn.functional.normalize(pooled, dim=1).double().numpy(), strict=True))
        return np.stack([found[number] for number in range(len(texts))])

    return embed
