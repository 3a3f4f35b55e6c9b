"""The trained parts of a Plan that are not pairs: whole modules, and the rows of new tokens."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from lorakeet.core.plan import ExtraEntry
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import Problems, nearest
from lorakeet.models import modules


def plan_extras(model: nn.Module, spec: LoraSpec, adapted: list[str], problems: Problems) -> tuple[ExtraEntry, ...]:
    """The extras that `spec` asks for; `adapted` are the paths that get a pair, which no extra may share."""
    extras = [*_whole_modules(model, spec, problems), *_new_rows(model, spec, problems)]
    taken = [path for extra in extras for path in (extra.path, extra.tied) if path]  # a tied head gets the new rows too
    for place in dict.fromkeys(taken):
        clash = [path for path in adapted if path == place or path.startswith(f"{place}.")]
        if clash:
            problems.add(f"'{place}' would be trained as an extra, and '{clash[0]}' gets a pair as well; choose one.")
        inside = [path for path in taken if path.startswith(f"{place}.")]
        if inside:
            problems.add(f"'{place}' and '{inside[0]}' within it are both extras; name one.")
    if len(set(taken)) < len(taken):
        problems.add("New tokens train rows of a module that lora.extra_modules trains whole; leave it out of extra_modules.")
    return tuple(extras)


def _whole_modules(model: nn.Module, spec: LoraSpec, problems: Problems) -> list[ExtraEntry]:
    every = [(path, module) for path, module in modules.original_modules(model) if path]
    found: dict[str, ExtraEntry] = {}
    for name in spec.extra_modules:
        matches = [(path, module) for path, module in every if path == name or path.endswith(f".{name}")]
        if not matches:
            leaves = list(dict.fromkeys(path.rpartition(".")[2] for path, _ in every))
            problems.add(f"No module matches lora.extra_modules '{name}'.{nearest(name, leaves)}")
        for path, module in matches:
            count = sum(parameter.numel() for parameter in module.parameters())
            if modules.is_packed(module):
                problems.add(
                    f"lora.extra_modules '{path}' has packed weights, which are never trained; leave it out, or keep the model's "
                    "weights with model.quantize none."
                )
            elif count:
                found[path] = ExtraEntry(path, "module", (count,))
            else:
                problems.add(f"lora.extra_modules '{path}' is a {type(module).__name__} without parameters; leave it out.")
    return list(found.values())


def _new_rows(model: nn.Module, spec: LoraSpec, problems: Problems) -> list[ExtraEntry]:
    """Rows of the input embedding, shared with a tied head; a head of its own gets rows of its own."""
    if not spec.new_tokens:
        return []
    repeated = sorted({token for token in spec.new_tokens if spec.new_tokens.count(token) > 1 or not token})
    if repeated:
        problems.add(f"lora.new_tokens {repeated[0]!r} is empty or named twice; name each token once.")
    embedding, head = modules.input_layer(model), modules.output_layer(model)
    if not isinstance(embedding, nn.Embedding):
        problems.add(f"lora.new_tokens needs a token embedding, which {type(model).__name__} does not have.")
        return []
    path, head_path = modules.path_of(model, embedding), modules.path_of(model, head)
    shape = (len(spec.new_tokens), embedding.embedding_dim)
    if head is None:
        return [ExtraEntry(path, "rows", shape, spec.new_tokens)]
    if cast(Any, head).weight is embedding.weight:
        return [ExtraEntry(path, "rows", shape, spec.new_tokens, tied=head_path)]
    if type(head) is not nn.Linear or head.bias is not None:
        problems.add(f"lora.new_tokens needs a plain head without bias; '{head_path}' is a {type(head).__name__} with more.")
    return [ExtraEntry(path, "rows", shape, spec.new_tokens), ExtraEntry(head_path, "rows", shape, spec.new_tokens)]
