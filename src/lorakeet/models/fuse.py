"""Replaces a model's modules by the fused ones of core/fused, where these compute the same."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name
from torch.utils._python_dispatch import _disable_current_modes  # nor for this

from lorakeet.core.fused.attention import HEAD_NORMS, INPUTS, RotaryAttention
from lorakeet.core.fused.decode_block import DecodeBlock
from lorakeet.core.fused.mlp_and_norm import ACTIVATIONS, MLP, FrozenRmsNorm, GatedMlp
from lorakeet.core.fused.trained_block import TrainedBlock
from lorakeet.core.layers.linear import BLOCK_PARTS, LoraLinear, Replacement, dense_base_of, new_pair
from lorakeet.core.plan import PlanEntry
from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels.cpu import operators as native
from lorakeet.kernels.device import REHEARSED
from lorakeet.memory.beside import shares_cores
from lorakeet.memory.remembered import remembered
from lorakeet.models import modules
from lorakeet.models.attention import VARLEN
from lorakeet.models.families import Family
from lorakeet.models.frozen_prefix import PrefixBlock
from lorakeet.models.recomputed import RecomputedBlock

FUNCTIONS = (FunctionType, BuiltinFunctionType)
AROUND = (PrefixBlock, RecomputedBlock)  # they wrap a block, fused or not
_PROBE_ROWS = 5
_PROBE_LENGTHS = (4, 3)  # tokens of the two rows that probe an attention
_WIDTH = 8  # width of the small copy that is probed if a model has no numbers
FUSED_TOLERANCE = 16  # in units of the dtype's rounding: the fused function rounds differently
_NORM = "norm"
_FOUND: dict[Hashable, str | None] = {}  # what small copies of these makings computed the same as: an activation, or the norm
_SAME: set[Hashable] = set()  # what attentions whose small copies computed the same are made of (`_makings`)


def fuse(model: nn.Module) -> int:
    """Replaces gated MLPs, RMSNorms and row attention by fused modules, each compared with its original; returns how many.

    Parts that texts do not pass, such as a vision tower, stay as they are. The fused modules wrap the originals, so that paths,
    weights and adapters stay the same; `unfuse` removes them. A norm that is kept in another dtype than the model stays: what it
    returns has the model's dtype in some families, its own in others.
    """
    count, dtype = 0, getattr(model, "dtype", None)
    outside = tuple(f"{path}." for path in modules.outside_text(model))
    for path, module in list(modules.original_modules(model)):
        current = modules.find(model, path)
        if isinstance(current, Replacement) or current is None or not path or f"{path}.".startswith(outside):
            continue
        with native.torch_only():  # they are compared bit for bit
            fused = _fused(module)
        if isinstance(fused, FrozenRmsNorm) and dtype is not None and fused.weight.dtype != dtype:
            continue
        if fused is not None:
            fused.train(module.training)
            modules.replace(model, path, fused)
            count += 1
    return count


def fuse_blocks(model: nn.Module, family: Family, kind: type[DecodeBlock | TrainedBlock] = DecodeBlock) -> int:
    """Replaces decoder blocks of fused parts, and nothing else, by fused blocks of this kind; returns how many.

    Fused blocks of the other kind are replaced too.
    """
    prefix, blocks = modules.block_prefix(model, family)
    count = 0
    for number in range(blocks):
        path = f"{prefix}.{number}"
        current = modules.find(model, path)
        around = current if isinstance(current, AROUND) else None
        block = current if around is None else around.original
        if type(block) is kind:
            count += 1
            continue
        if isinstance(block, (DecodeBlock, TrainedBlock)):
            block = block.original
        if block is None or not _is_plain(block, training=kind is TrainedBlock):
            continue
        fused = kind(block).train(block.training)
        if around is not None:
            around.original = fused
        else:
            modules.replace(model, path, fused)
        count += 1
    return count


class _Stub(nn.Module):
    """Replaces a part of a block while the block's own code is probed."""

    def __init__(self, factor: float, *, pair: bool = False) -> None:
        super().__init__()
        self.factor, self.pair = factor, pair

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        found = torch.sin(hidden_states * self.factor)
        return (found, None) if self.pair else found


def _is_plain(block: nn.Module, *, training: bool = False) -> bool:
    """True if the block computes only x + attention(norm(x)) and x + mlp(norm(x)); in `training` mode if set."""
    if isinstance(block, Replacement) or block._parameters or set(block._modules) != set(BLOCK_PARTS):
        return False
    kinds = (FrozenRmsNorm, RotaryAttention, FrozenRmsNorm, GatedMlp)
    if not all(isinstance(block._modules[name], kind) for name, kind in zip(BLOCK_PARTS, kinds, strict=True)):
        return False
    if not training and cast(RotaryAttention, block._modules["self_attn"]).head_norms() != []:
        return False  # core/fused/decode_block has none
    first, attention, second, mlp = stubs = (_Stub(0.7), _Stub(1.3, pair=True), _Stub(0.4), _Stub(2.1))
    probed = copy.copy(block)
    probed._forward_hooks, probed._forward_pre_hooks = OrderedDict(), OrderedDict()  # no hook sees the probe
    probed.training = training
    probed._modules = dict(zip(BLOCK_PARTS, stubs, strict=True))
    x = torch.randn(1, sum(_PROBE_LENGTHS), _WIDTH, generator=torch.Generator().manual_seed(2))
    try:
        theirs = probed(x, position_embeddings=(x, x), attention_mask=None)
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False
    added = x + attention(first(x))[0]
    expected = added + mlp(second(added))
    return isinstance(theirs, Tensor) and torch.equal(theirs, expected)


def unfuse(model: nn.Module) -> None:
    """Removes all fused modules."""
    for path, module in list(modules.original_modules(model)):
        current = modules.find(model, path)
        if isinstance(current, AROUND):
            current.original = module
        elif isinstance(current, (GatedMlp, FrozenRmsNorm, RotaryAttention, DecodeBlock, TrainedBlock)):
            modules.replace(model, path, module)


def _fused(module: nn.Module) -> Replacement | None:
    """Returns the fused module that computes the same as `module`, or None.

    A small copy is probed if it has no numbers (a planned model), or packed weights, which would be unpacked several times.
    """
    if _has_attention_names(module):
        return _attention(module)
    if not _without_numbers(module) and not modules.is_packed(module):
        return _mlp(module) or _norm(module)
    if not _has_mlp_names(module) and set(module._parameters) != {"weight"}:
        return None
    own = _makings(module)
    makings = None if own is None else (_dtype_of(module), REHEARSED.get(), own)
    if makings is None:
        name = _of_small_copy(module)
    else:
        if makings not in _FOUND:
            (_FOUND[makings],) = remembered(lambda: ("small copy", _by_name(makings)), lambda: (_of_small_copy(module),))
        name = _FOUND[makings]
    if name is None:
        return None
    return FrozenRmsNorm(module) if name == _NORM else GatedMlp(module, name)


def _of_small_copy(module: nn.Module) -> str | None:
    """The activation with which a small copy computes the same as a fused one, or _NORM."""
    with _with_numbers():
        small = small_copy(module)
        found = None if _without_numbers(small) else _fused(small)  # a module within it has weights too, as ERNIE's router
    if isinstance(found, GatedMlp):
        return next(name for name, activation in ACTIVATIONS.items() if activation is found.activation)
    return None if found is None else _NORM


@contextmanager
def _with_numbers() -> Iterator[None]:
    """A context in which a small copy computes within a rehearsal; by one thread where processes compute beside this one."""
    threads = torch.get_num_threads()
    try:
        if shares_cores():
            torch.set_num_threads(1)
        with _disable_current_modes():
            yield
    finally:
        if shares_cores():
            torch.set_num_threads(threads)


def _without_numbers(module: nn.Module) -> bool:
    return any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in module.parameters())


def _by_name(makings: Any) -> Any:
    """The same, with code by its name: what another process knows it by."""
    if isinstance(makings, tuple):
        return tuple(map(_by_name, makings))
    return f"{makings.__module__}.{makings.__qualname__}" if isinstance(makings, (type, *FUNCTIONS)) else makings


def _has_mlp_names(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    return set(MLP) <= children and not children - {*MLP, "act_fn"}


def _has_attention_names(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    return children - {*HEAD_NORMS} == {*INPUTS, "o_proj"} and not module._parameters


def _attention(module: nn.Module) -> RotaryAttention | None:
    """Probes a small fp32 copy with pairs, which shows a cap, another norm or another rotation."""
    named = getattr(getattr(module, "config", None), "_attn_implementation", None)
    head, scaling = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    if named != VARLEN or not isinstance(scaling, float) or not isinstance(head, int) or _drops(module, but="attention_dropout"):
        return None
    norms = [cast(nn.Module, module._modules[name]) for name in HEAD_NORMS if name in module._modules]
    fused_norms = [norm if isinstance(norm, FrozenRmsNorm) else _fused(norm) for norm in norms]
    if len(norms) == 1 or not all(isinstance(norm, FrozenRmsNorm) for norm in fused_norms):
        return None  # another kind of norm, or one that rounds differently
    makings = _makings(module)
    if makings in _SAME:
        return RotaryAttention(module)
    if makings is None:
        return RotaryAttention(module) if _attention_of_small_copy(module, head) else None
    if not remembered(lambda: ("attention", _by_name(makings)), lambda: _attention_of_small_copy(module, head)):
        return None
    _SAME.add(makings)
    return RotaryAttention(module)


def _attention_of_small_copy(module: nn.Module, head: int) -> bool:
    """Whether a small copy of an attention with such heads computes the same as a fused one."""
    generator, count = torch.Generator().manual_seed(1), sum(_PROBE_LENGTHS)
    with _with_numbers(), torch.no_grad():
        small = _small_attention(module)
        x = torch.randn(1, count, _WIDTH, generator=generator)
        turn = torch.rand(1, count, head // 2, generator=generator).mul_(6).repeat(1, 1, 2)
        given = {"position_embeddings": (turn.cos(), turn.sin()), "row_lengths": _PROBE_LENGTHS, "attention_mask": None}
        for size in (1, 100):  # scale of the input: shows caps on large numbers too
            try:
                theirs, ours = (cast(Any, attention)(size * x, **given)[0] for attention in (small, RotaryAttention(small)))
            except (TypeError, RuntimeError, AttributeError, ValueError, EnvironmentProblem):
                return False
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())):
                return False
    return True


def _makings(module: nn.Module) -> Hashable | None:
    """All that the small copy of an attention is made of: code, settings, place in the model; None if something else is there."""
    found: list[Any] = [type(module), type(module).forward]
    for name, value in vars(module).items():
        if name == "_modules":
            for key, child in module._modules.items():
                whole = key in HEAD_NORMS or key == "act_fn"
                own = _makings(modules.unwrapped(cast(nn.Module, child))) if whole else getattr(child, "bias", None) is not None
                if own is None:
                    return None
                found.append((key, own))
        elif name == "_parameters":
            found.append(tuple(module._parameters))
        elif hasattr(value, "to_dict"):  # its configuration; where the model lies does not matter
            settings = {key: setting for key, setting in vars(value).items() if key != "_name_or_path"}
            found.append((name, type(value), repr(settings)))
        elif value is None or isinstance(value, (bool, int, float, str, *FUNCTIONS)):
            found.append((name, value))
        elif not isinstance(value, (dict, set)) or value:  # hooks, buffers, values of a kind not known here
            return None
    return tuple(found)


def _drops(module: nn.Module, *, but: str = "") -> bool:
    """True if the module's own code has dropout, which a fused module lacks."""
    return any("dropout" in name and name != but and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())


def _small_attention(module: nn.Module) -> nn.Module:
    """Returns the attention with small random weights and pairs, wide enough for its heads; large scores show caps."""
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    small._modules = dict(module._modules)
    head, groups = cast(int, module.head_dim), cast(int, getattr(module, "num_key_value_groups", 1))
    shapes = {"q_proj": (2 * groups * head, _WIDTH), "k_proj": (2 * head, _WIDTH), "v_proj": (2 * head, _WIDTH)}
    for name, shape in {**shapes, "o_proj": (_WIDTH, 2 * groups * head)}.items():
        biased = getattr(module._modules[name], "bias", None) is not None
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = _random(generator, torch.float32, *shape)
        if biased:
            linear.bias = _random(generator, torch.float32, shape[0])
        pair = new_pair(PlanEntry(name, "linear", shape, 2, 2.0), weight=lambda: torch.empty(0), seed=0)
        nn.init.normal_(pair.B, generator=generator)
        layer = LoraLinear(linear, dense_base_of(linear, "linear"))
        layer.attach("probe", pair.eval())
        layer.active = "probe"
        small._modules[name] = layer
    for name in set(HEAD_NORMS) & set(small._modules):
        norm = copy.copy(modules.unwrapped(cast(nn.Module, small._modules[name])))
        norm._forward_hooks, norm._forward_pre_hooks = OrderedDict(), OrderedDict()
        norm._parameters = {key: _random(generator, torch.float32, head) for key in norm._parameters}
        small._modules[name] = FrozenRmsNorm(norm)
    return small.eval()


def _mlp(module: nn.Module) -> GatedMlp | None:
    if not _has_mlp_names(module):
        return None
    act = getattr(module, "act_fn", None)
    gate, up, down = (getattr(module, name) for name in MLP)
    weight = cast(Tensor, gate.weight)
    if act is None or not weight.is_floating_point() or _drops(module):
        return None
    probe = _probe(weight.shape[1], weight)
    with torch.no_grad():
        probes = [probe * size for size in modules.probe_sizes(gate, probe)]  # large numbers show a clamp
        theirs = [module(x) for x in probes]
        for name, activation in ACTIVATIONS.items():
            ours = (down(activation.forward(gate(x)) * up(x)) for x in probes)
            if all(torch.equal(own, their) for own, their in zip(ours, theirs, strict=True)):
                fused = GatedMlp(module, name)
                off = (fused(probe).float() - theirs[0].float()).abs().max()  # with the pairs that are on it, if any
                return fused if off <= FUSED_TOLERANCE * torch.finfo(probe.dtype).eps * theirs[0].float().abs().max() else None
    return None


def _norm(module: nn.Module) -> FrozenRmsNorm | None:
    own = dict(module.named_parameters())
    if set(own) != {"weight"} or not isinstance(getattr(module, "variance_epsilon", None), float) or own["weight"].requires_grad:
        return None
    if not own["weight"].is_floating_point():
        return None
    if len(inspect.signature(module.forward).parameters) != 1 or own["weight"].dim() != 1:  # a gated norm, or one for each head
        return None
    x = _probe(own["weight"].shape[0], own["weight"])
    fused = FrozenRmsNorm(module)
    with torch.no_grad():
        return fused if torch.equal(cast(Any, fused)(x), module(x)) else None


def _probe(width: int, like: Tensor) -> Tensor:
    """Returns random input (rows, width) in the dtype and on the device of a weight."""
    noise = torch.randn(_PROBE_ROWS, width, generator=torch.Generator().manual_seed(0))
    return noise.to(device=like.device, dtype=like.dtype)


def small_copy(module: nn.Module) -> nn.Module:
    """Returns the module with small random weights: its function does not depend on the width of its matrices."""
    dtype, generator = _dtype_of(module), torch.Generator().manual_seed(0)
    small = copy.copy(module)
    small._parameters, small._modules = dict(module._parameters), dict(module._modules)
    for name in module._parameters:
        small._parameters[name] = _random(generator, dtype, _WIDTH)
    for name in set(MLP) & set(module._modules):
        linear = nn.Linear(_WIDTH, _WIDTH, bias=False, device="meta")
        linear.weight = _random(generator, dtype, _WIDTH, _WIDTH)
        small._modules[name] = linear
    return small


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype), requires_grad=False)
