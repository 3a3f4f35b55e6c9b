"""Pairs on any torch module, for any trainer: attach, train with your own loop, take the adapter, detach."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lorakeet.api.adapter import AdapterValue
from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.models import inject
from lorakeet.models.families import family_of
from lorakeet.models.fits import plan_of
from lorakeet.models.targets import plan_for
from lorakeet.settings import load as load_settings
from lorakeet.settings import to_mapping

_FLAGS: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()  # requires_grad of each parameter before


def attach(net: nn.Module, lora: LoraSpec | Adapter = LoraSpec(), *, name: str = "default", seed: int = 0) -> Plan:
    """Adds trainable pairs to `net`, or a finished adapter, and freezes everything else; returns what was added.

    At the start B = 0, so that `net` computes what it did. Modules are wrapped, not copied: `net` stays the same object.
    Raises ConfigError for settings that fit no module, an adapter that does not fit, and a name that is taken.
    """
    if inject.has_adapter(net, name):
        raise ConfigError(f"An adapter {name!r} is already attached. Detach it first, or give another name.")
    flags = {path: parameter.requires_grad for path, parameter in net.named_parameters()}
    if isinstance(lora, Adapter):
        inject.attach(net, lora, name)
        plan = plan_of(net, lora)
    else:
        config: Any = getattr(net, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        checked = load_settings(LoraSpec, to_mapping(lora), where="lk.attach")
        plan = plan_for(net, checked, family_of(text))
        inject.inject(net, plan, name, seed=seed)
    for parameter in parameters(net, name):
        parameter.requires_grad_(True)
    _FLAGS.setdefault(net, flags)
    return plan


def parameters(net: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The trained parameters of an attached adapter, for an optimizer. Raises ConfigError if there is none of that name."""
    return list(inject.trained_parameters(net, name).values())


def adapter_of(net: nn.Module, name: str = "default", *, base: str = "") -> AdapterValue:
    """A copy of an attached adapter, in fp32 on the CPU; `base` is the name of its base model, for its files."""
    named = base or str(getattr(net, "name_or_path", "") or "")
    return AdapterValue.of(inject.adapter_of(net, name, base=named))


def detach(net: nn.Module, name: str | None = None) -> None:
    """Removes an adapter (None: all); without adapters `net` is as it was before, bit for bit, gradients' flags included.

    Raises ConfigError if none is attached.
    """
    if not inject.adapter_names(net):
        raise ConfigError("No adapter is attached to this module; lk.attach adds one.")
    inject.eject(net, name)
    if not inject.adapter_names(net):
        flags = _FLAGS.pop(net, {})
        for path, parameter in net.named_parameters():
            parameter.requires_grad_(flags.get(path, parameter.requires_grad))
