"""How the frozen linear layers are kept in memory: `QuantSpec`, the `model.quantize` part of a run file. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

NF4_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class QuantSpec:
    """The quantisation of a model's frozen linear layers as it is loaded; embeddings, norms and experts stay as they are.

    A model folder that is quantised already (NF4 of bitsandbytes, GPTQ) is recognised by its files: leave `method` at none.
    """

    method: Literal["none", "nf4", "int8", "gguf"] = field(
        default="none",
        metadata={
            "help": "none: as they are, a .gguf file unpacked; nf4: QLoRA's 4-bit code; int8: a byte a weight; "
            "gguf: the file's own blocks."
        },
    )
    block_size: int = field(
        default=64, metadata={"help": "Weights that share one scale in nf4: 32, 64, 128, 256, 512 or 1024."}
    )
    double_quant: bool = field(default=True, metadata={"help": "Whether nf4 keeps its scales in 8 bits too."})
    head: Literal["keep", "quantize"] = field(
        default="keep", metadata={"help": "Whether the output layer over the vocabulary is quantised as well."}
    )

    def validate(self) -> list[str]:
        """Every problem of these settings in words."""
        if self.block_size in NF4_BLOCK_SIZES:
            return []
        return [
            f"model.quantize.block_size is {self.block_size}; expected one of {', '.join(map(str, NF4_BLOCK_SIZES))}, such as 64."
        ]
