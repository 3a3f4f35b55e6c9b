"""Runs on text: a causal language model that learns to answer."""

from __future__ import annotations

from typing import Any

from lorakeet.core.spec import MEASURED
from lorakeet.registry import KindDeclaration, Objective


def _conflicts(config: Any) -> list[str]:
    """What only runs on text have, in a run of another kind."""
    if config.kind == DECLARATION.name:
        return []
    earlier = {"continue_from": config.lora.continue_from, "on_top_of": config.lora.on_top_of}
    found = [
        f"lora.{name} is {given}, but kind is {config.kind}: only runs on text begin with an adapter. Leave it out."
        for name, given in earlier.items() if given is not None
    ]  # fmt: skip
    if config.lora.start in MEASURED:
        found.append(f"lora.start {config.lora.start} needs rows of text, but kind is {config.kind}. Use lora.start kaiming.")
    return found


DECLARATION = KindDeclaration(
    name="text",
    help="a causal language model",
    module="lorakeet.kinds.text.kind",
    objectives=(Objective(name="sft", rows="lorakeet.kinds.text.rows:with_one_answer", older=True),),
    trains="answers (sft)",
    text_model=True,
    rows_called="texts",
    taken_as=("merge", "gguf", "ollama", "mlx", "push"),
    trials="lorakeet.kinds.text.tuning.trials:Trials",
    conflicts=_conflicts,
    require_rows="lorakeet.kinds.text.early:require_text_rows",
    require_model="lorakeet.kinds.text.early:require_text_base",
)
