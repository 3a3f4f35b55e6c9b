"""`QuantSpec`, the `model.quantize` part of a run file: quantisation of the frozen linear layers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorakeet.setting import setting

NF4_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class QuantSpec:
    """Quantisation of a model's frozen linear layers and stacked experts at loading; embeddings and norms are not quantised.

    A model folder that is quantised already (NF4 of bitsandbytes, GPTQ, FP8, MXFP4) is recognised: leave `method` at none.
    """

    method: Literal["none", "nf4", "int8", "gguf"] = setting(
        "none", "nf4: QLoRA's 4-bit code; int8: one byte per weight; gguf: the file's own blocks; none: no quantisation."
    )
    block_size: int = setting(64, "Weights that share one scale in nf4: 32, 64, 128, 256, 512 or 1024.")
    double_quant: bool = setting(True, "Whether nf4 quantises its scales to 8 bits as well.")
    head: Literal["keep", "quantize"] = setting("keep", "Keep the output layer (lm_head) as it is, or quantise it too.")
    int8_products: bool = setting(False, "Whether training multiplies int8 weights in int8; evaluation never does.")

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        problems = []
        if self.block_size not in NF4_BLOCK_SIZES:
            sizes = ", ".join(map(str, NF4_BLOCK_SIZES))
            problems.append(f"model.quantize.block_size is {self.block_size}; expected one of {sizes}, such as 64.")
        if self.int8_products and self.method not in ("int8", "none"):
            problems.append(
                f"model.quantize.int8_products is true, but model.quantize.method is {self.method}; int8 products "
                "need int8 weights. Set the method to int8, or int8_products to false."
            )
        return problems
