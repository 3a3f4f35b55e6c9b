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
    int8_products: bool = field(
        default=False,
        metadata={
            "help": "Whether training multiplies by int8 weights in int8, forward and backward; judging never does. "
            "Not run on a GPU."
        },
    )

    def validate(self) -> list[str]:
        """Every problem of these settings in words."""
        problems = []
        if self.block_size not in NF4_BLOCK_SIZES:
            sizes = ", ".join(map(str, NF4_BLOCK_SIZES))
            problems.append(f"model.quantize.block_size is {self.block_size}; expected one of {sizes}, such as 64.")
        if self.int8_products and self.method not in ("int8", "none"):
            problems.append(
                f"model.quantize.int8_products is true, but model.quantize.method is {self.method}; products run in int8 over "
                "weights in int8. Set the method to int8, or int8_products to false."
            )
        return problems
