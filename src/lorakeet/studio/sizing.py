"""How large each way to take a run away is, and about how long it takes here: from the model's shapes and measured rates.

Imports torch: it is carried out by the workbench alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakeet.config import read_run
from lorakeet.disk import create, erase, flush, read_regular
from lorakeet.evaluate.wording import bytes_text, duration_text
from lorakeet.kinds.text.run_time import Speed, measured_speed
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.text.from_config import config_of
from lorakeet.studio.taking import QUANTS, WAYS, bytes_of
from lorakeet.studio.workbench import Send
from lorakeet.train.run import RunFolder

# Bits of a weight in a matrix: exact for the first four, else about, as llama.cpp's tools/quantize/README has them for Llama 3.1.
BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.6, "q5_1": 6.1, "q5_0": 5.6,
    "q4_k_m": 4.9, "q4_k_s": 4.7, "q4_1": 5.1, "q4_0": 4.7, "q3_k_l": 4.3, "q3_k_m": 4.0, "q3_k_s": 3.6, "q2_k": 3.2,
    "iq4_nl": 4.7, "iq4_xs": 4.5,
}  # fmt: skip
EXACT = ("f32", "f16", "bf16", "q8_0")
PROBE = 32 << 20  # bytes that are written to measure the disk
STARTING = 12.0  # seconds to import, to read the tokenizer and to open the run
QUANTISED = 20e6  # weights a second, about, in llama.cpp on two cores
MERGE_TOKENS, EXPORT_ROWS = 8192, 8  # that are compared after a merge and an export (verification/merged_model, verbs/export)


@dataclass(frozen=True)
class Numbers:
    """How many numbers a model has: in matrices, which are quantised, and elsewhere; and the bytes of one as it is stored."""

    matrices: int
    others: int
    width: int

    @property
    def stored(self) -> int:
        """Bytes of the model as it is."""
        return (self.matrices + self.others) * self.width

    def quantised(self, quant: str) -> int:
        """Bytes of the tensors of a GGUF file of this type; vectors stay in fp32."""
        return int(self.matrices * BITS[quant] / 8) + 4 * self.others


def sizes_of_run(settings: Mapping[str, str], send: Send) -> None:
    """Sends {"sizes": {way: words}, "quants": {type: words}} of the run in settings["folder"], and times as far as measured.

    Raises what reading the run's model raises.
    """
    run = RunFolder(Path(settings["folder"]))
    config = read_run(run.config)
    adapter = bytes_text(bytes_of(run.adapter))
    sizes = dict.fromkeys(WAYS, f"about {adapter}; some seconds")
    sizes["push"] = f"{adapter} to send, with report and certificate"
    if not config.declaration.text_model:
        send({"sizes": sizes, "quants": {}})
        return
    numbers = numbers_of(config_of(config.model, lambda line: send({"say": line})))
    disk, speed = disk_rate(Path(settings["folder"])), measured_speed(torch.float32)
    held_out = len(json.loads(read_regular(run.split)).get("held_out", ())) if run.split.is_file() else EXPORT_ROWS
    tokens = min(MERGE_TOKENS, held_out * config.data.max_tokens)
    seconds = merge_seconds(numbers, disk, speed, tokens)
    sizes["merge"] = f"about {bytes_text(numbers.stored)}; about {duration_text(seconds)} here, its check among it"
    tokens = min(EXPORT_ROWS, held_out) * config.data.max_tokens
    quants = {
        quant: f"{'' if quant in EXACT else 'about '}{bytes_text(numbers.quantised(quant))}; about "
        f"{duration_text(export_seconds(numbers, quant, disk, speed, tokens))} here"
        for quant in QUANTS
    }
    send({"sizes": sizes, "quants": quants})


def numbers_of(model_config: Any) -> Numbers:
    """The numbers of the model that a configuration describes; tied matrices count once."""
    model = skeleton(model_config)
    model.tie_weights()
    sizes = [(parameter.dim() > 1, parameter.numel()) for parameter in model.parameters()]
    matrices = sum(size for matrix, size in sizes if matrix)
    return Numbers(matrices, sum(size for _, size in sizes) - matrices, stored_dtype(model_config).itemsize)


def merge_seconds(numbers: Numbers, disk: float, speed: Speed, tokens: int) -> float:
    """Seconds to read and write the model, and to compare two models on so many tokens; the arithmetic is about known."""
    products = 2.0 * (numbers.matrices + numbers.others) * tokens
    return STARTING + 3 * numbers.stored / disk + 2 * products / speed.flops


def export_seconds(numbers: Numbers, quant: str, disk: float, speed: Speed, tokens: int) -> float:
    """Seconds to write a GGUF file, to quantise it where that is done by llama.cpp, and to compare it."""
    wide = 0 if quant in EXACT else numbers.stored
    quantising = 0.0 if quant in EXACT else numbers.matrices / QUANTISED
    return merge_seconds(numbers, disk, speed, tokens) + (numbers.quantised(quant) + wide) / disk + quantising


def disk_rate(folder: Path) -> float:
    """Bytes a second that are written to the disk of `folder`, flushed."""
    path = folder / f".disk-{os.getpid()}.partial"
    try:
        with create(path) as file:
            start = time.perf_counter()
            file.write(bytes(PROBE))
            file.flush()
            flush(path)
            return PROBE / (time.perf_counter() - start)
    finally:
        erase(path)
