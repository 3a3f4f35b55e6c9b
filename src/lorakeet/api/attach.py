"""Pairs on any torch module, for any trainer: attach, train with your own loop, take the adapter, detach."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from lorakeet.api.adapter import AdapterValue
from lorakeet.api.arguments import as_argument, python_call
from lorakeet.api.display import ShownPairs
from lorakeet.core.adapter import Adapter
from lorakeet.core.layers.linear import LoraLinear
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.models import inject
from lorakeet.models.families import family_of
from lorakeet.models.fits import plan_of
from lorakeet.models.targets import plan_for
from lorakeet.settings import load as load_settings
from lorakeet.settings import to_mapping

_FLAGS: WeakKeyDictionary[nn.Module, list[tuple[ref[nn.Parameter], bool]]] = WeakKeyDictionary()  # requires_grad before


@python_call(as_argument)
def attach(net: nn.Module, lora: LoraSpec | Adapter = LoraSpec(), *, name: str = "default", seed: int = 0) -> Plan:
    """Adds trainable pairs to `net`, or a finished adapter, and freezes everything else; returns what was added.

    At the start B = 0, so that `net` computes what it did. Modules are wrapped, not copied: `net` stays the same object. Of
    several adapters the last one is active; `activate` chooses another. Raises ConfigError for settings that fit no module, an
    adapter that does not fit, a name that is taken, and a net that has adapters within a larger or smaller one.

    Examples:
        >>> import lorakeet as lk
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> plan = lk.attach(net, lk.Lora(rank=2, target_modules=("0", "2")))
        >>> plan.parameters, [tuple(parameter.shape) for parameter in lk.parameters(net)]
        (88, [(2, 8), (16, 2), (2, 16), (4, 2)])
        >>> list(lk.adapter_of(net))
        ['0', '2']
        >>> lk.detach(net)
    """
    if inject.has_adapter(net, name):
        raise ConfigError(f"An adapter {name!r} is already attached. Detach it first, or give another name.")
    if inject.adapter_names(net) and net not in _FLAGS:
        raise ConfigError("A part of this module has an adapter of its own. Detach that first, or attach to the same module.")
    flags = [(ref(parameter), parameter.requires_grad) for parameter in net.parameters()]
    if isinstance(lora, Adapter):
        inject.attach(net, lora, name)
        plan = plan_of(net, lora)
    else:
        config: Any = getattr(net, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        checked = load_settings(LoraSpec, to_mapping(lora), where="lk.attach")
        if earlier := checked.earlier:
            raise ConfigError(
                f"lk.attach adds new pairs, but lora names the earlier adapter {earlier}. Attach lk.Adapter.read({earlier!r}) "
                "to train it further, or use lk.finetune."
            )
        plan = plan_for(net, checked, family_of(text))
        inject.inject(net, plan, name, seed=seed)
    for layer in net.modules():
        if isinstance(layer, LoraLinear):
            layer.by_torch = True
    for parameter in parameters(net, name):
        parameter.requires_grad_(True)
    _FLAGS.setdefault(net, flags)
    return ShownPairs.of(plan)


@python_call(as_argument)
def parameters(net: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The trained parameters of an attached adapter, for an optimizer. Raises ConfigError if there is none of that name."""
    return list(inject.trained_parameters(net, name).values())


@python_call(as_argument)
def adapter_of(net: nn.Module, name: str = "default", *, base: str = "") -> AdapterValue:
    """A copy of an attached adapter, in fp32 on the CPU; `base` is the name of its base model, for its files."""
    named = base or str(getattr(net, "name_or_path", "") or "")
    return AdapterValue.of(inject.adapter_of(net, name, base=named))


@python_call(as_argument)
def detach(net: nn.Module, name: str | None = None) -> None:
    """Removes an adapter (None: all); without adapters `net` is as it was before, bit for bit, gradients' flags included.

    If the active one goes, the last that is left is active. Raises ConfigError if none is attached.
    """
    if not inject.adapter_names(net):
        raise ConfigError("No adapter is attached to this module; lk.attach adds one.")
    inject.eject(net, name)
    left = inject.adapter_names(net)
    if left:
        if inject.selection_of(net).active not in left:
            inject.activate(net, left[-1])
        return
    for parameter, trained in _FLAGS.pop(net, []):
        if (alive := parameter()) is not None:
            alive.requires_grad_(trained)


@python_call(as_argument)
def activate(net: nn.Module, name: str | None) -> None:
    """Makes an attached adapter the one that computes and is trained; None: the base alone. Raises ConfigError if unknown."""
    inject.activate(net, name)
