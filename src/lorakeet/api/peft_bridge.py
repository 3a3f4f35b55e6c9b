"""Adapters to and from PEFT's models in memory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from lorakeet.api.adapter import AdapterValue
from lorakeet.api.arguments import as_argument, given_as, python_call
from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, PackageMissing, nearest, one_message
from lorakeet.formats.peft import peft


@python_call(as_argument)
def from_peft(model: Any, name: str | None = None) -> AdapterValue:
    """The adapter `name` (default: the active one) of a PeftModel, as a value.

    Raises ConfigError for what is no PeftModel, an unknown name, and adapters that are not LoRA.
    """
    known = dict(getattr(model, "peft_config", {}) or {})
    if not known or not hasattr(model, "save_pretrained"):
        raise ConfigError(f"model is {given_as(model)}; expected a PeftModel with an adapter.")
    chosen = name if name is not None else str(model.active_adapter)
    if chosen not in known:
        raise ConfigError(f"The PeftModel has no adapter {chosen!r}; it has {', '.join(known)}.{nearest(chosen, known)}")
    with TemporaryDirectory() as place:
        model.save_pretrained(place, selected_adapters=[chosen], save_embedding_layers=False)
        folder = Path(place) / chosen if (Path(place) / chosen).is_dir() else Path(place)
        return AdapterValue.of(peft.read(folder))


@python_call(as_argument)
def to_peft(adapter: Adapter, model: nn.Module, name: str = "default") -> Any:
    """A PeftModel over the transformers model `model`, with `adapter` loaded.

    Raises EnvironmentProblem without PEFT, ConfigError for an adapter that PEFT's layout cannot hold.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise PackageMissing("to_peft needs PEFT", "peft") from error
    with TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        peft.write(adapter, folder)
        with one_message(
            "PEFT does not load the adapter into the model", "Is it a transformers model, and its base?", ConfigError
        ):
            return PeftModel.from_pretrained(model, str(folder), adapter_name=name)
