"""Language models with random weights in true shapes, and a tokenizer made by code: nothing has to be fetched."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.models.text.model import TextModel
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.spec import QuantSpec

NF4_SCALE, NF4_MEAN = 0.002, 0.05  # of random codes: weights about as large as those that a model starts with
WORDS = ("the", "bird", "sings", "a", "song", "of", "rain", "and", "sun", "in", "May")
SPECIAL = ("<|endoftext|>", "<|pad|>")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some 270 tokens, which writes every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=[*SPECIAL], initial_alphabet=letters, show_progress=False, min_frequency=1
    )
    core.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], bos_token=SPECIAL[0], pad_token=SPECIAL[1],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def dense_model(shape: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """transformers' model of that shape, with the same random weights for the same device and dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_from_settings(dict(shape)), dtype=dtype, **options)


def write_model(shape: Mapping[str, Any], folder: Path, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes that model and the tokenizer to `folder`, unless it is there."""
    if not (folder / "tokenizer.json").is_file():
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        dense_model({**shape, **ends}, device, dtype).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        if torch.device(device).type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # the GPU is for the processes that read the folder
    return folder


def write_rows(path: Path, count: int, words: int = 0) -> Path:
    """Writes rows of prompt and completion, the next words of a row of words that goes round: some six, or so many `words`."""
    lines = []
    for number in range(count):
        following = [WORDS[(number + step) % len(WORDS)] for step in range(words or 4 + number % 7)]
        begin = max(1, len(following) // 2)
        prompt, completion = " ".join(following[:begin]), " ".join(following[begin:])
        lines.append(json.dumps({"prompt": f"{number}: {prompt}", "completion": f" {completion}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def frozen_text(shape: Mapping[str, Any], device: torch.device, dtype: torch.dtype, *, base: str = "none") -> TextModel:
    """Lorakeet's model of that shape: dense weights are those of `dense_model`, NF4's are random codes."""
    torch.manual_seed(0)
    text = model_from_config(
        config_from_settings(dict(shape)), name="random", dtype=dtype, products=dtype, device=device,
        quantize=QuantSpec(method="nf4") if base == "nf4" else None,
    )  # fmt: skip
    for weight in text.model.modules():
        if isinstance(weight, Nf4Base):
            weight.packed.random_(0, 256)
            weight.absmax.random_(0, 256)
            assert weight.scales is not None and weight.mean is not None
            weight.scales.fill_(NF4_SCALE)
            weight.mean.fill_(NF4_MEAN)
    return text
