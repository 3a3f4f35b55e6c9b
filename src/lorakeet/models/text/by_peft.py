"""How the installed PEFT reads an adapter: which modules it puts pairs on, and the logits with them. PEFT is no requirement.

Before training its own code places pairs on the model without weights, as the adapter's configuration will say. After training it
loads the adapter from disk onto a base in memory, whose logits are compared in fp32 with those of Lorakeet's pairs on that base.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.layers.extras import TrainedRows
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.data.chat import Example
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.peft.peft import peft_tensors
from lorakeet.formats.peft.peft_config import config_text
from lorakeet.formats.peft.renamed_targets import WEIGHT, model_type_to_keep
from lorakeet.models import modules
from lorakeet.models.files.foreign_code import build_native
from lorakeet.models.files.quantized import plain_config
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.validate import auto_class_of
from lorakeet.models.fuse import unfuse
from lorakeet.models.inject import activate, adapter_parts, eject, use_products
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import TextModel

IN_PEFT = " in PEFT"  # in the name of an adapter as PEFT reads it
ROWS, TOKENS = 2, 24  # how many rows are compared, and at most the first tokens of each
LARGEST = 4 << 30  # bytes of a base in fp32 whose logits are compared
ROUNDING = 1e-4  # of the largest logit: fp32, summed in another order
SHARE = 0.01  # of what the adapter changes
_LOGITS = 6  # tensors (tokens, vocabulary) at once: three passes and their differences
_PEFT = 64 << 20  # bytes of its modules once imported; 58 MiB were seen
_NESTED, _FACTOR, _ROOT = ".base_layer", ".lora_", "base_model.model."
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class PeftDifference:
    """How far PEFT's logits are from Lorakeet's, both in fp32; `of_effect` is None where the adapter changes too little."""

    tokens: int
    logit: float  # difference relative to the largest logit: the largest, or of a mixture of experts that of the median token
    of_effect: float | None  # the same relative to what the adapter changes
    median: bool  # whether it is that of the median token


def peft_version() -> str:
    """The version of the installed PEFT; empty without one."""
    try:
        return version("peft")
    except PackageNotFoundError:
        return ""


def why_not_by_peft(text: TextModel) -> str:
    """Why PEFT's logits cannot be compared on such a base here; empty if they can."""
    if not peft_version():
        return "PEFT is not installed"
    if modules.is_packed(text.model):
        return "PEFT has no pairs for the packed weights of this base"
    size = 4 * sum(parameter.numel() for parameter in text.model.parameters())
    return f"the base takes {bytes_text(size)} in fp32, more than {bytes_text(LARGEST)}" if size > LARGEST else ""


def bytes_with_peft(weights: int, vocabulary: int) -> dict[str, int]:
    """The bytes, by kind, of a comparison on a base of so many weights; none where it is not made.

    They are the base in fp32, logits, and PEFT itself.
    """
    if not peft_version() or 4 * weights > LARGEST:
        return {}
    return {"base": 4 * weights, "logits": _LOGITS * ROWS * TOKENS * vocabulary * 4, "runtime": _PEFT}


def unread_by_peft(config: Any, plan: Plan, owner: Any = None) -> str:
    """What the installed PEFT will not read of the adapter that `plan` trains; empty if it has a pair for each and fills it.

    ImportError without PEFT. Builds the model of `config` without weights, of the class `owner` (default: a causal model's).
    """
    pairs = {entry.path: _without_numbers(entry) for entry in plan.entries}
    if not pairs:
        return ""  # new rows and whole modules alone
    adapter = Adapter(pairs, base="", metadata=model_type_to_keep(config.model_type))
    try:
        found, dropped = _placed(config, auto_class_of(config) if owner is None else _Owner(owner), adapter)
    except ImportError:
        raise
    except Exception as error:  # of any kind: PEFT's refusals are ValueError, TypeError, NotImplementedError and others
        return f"it refuses: {' '.join(str(error).split())[:300]}"
    lacking, more = sorted(pairs.keys() - found), sorted(found - pairs.keys())
    said = [f"it puts no pair on {_listed(lacking)}"] if lacking else []
    said += [f"it puts pairs on {_listed(more)} too"] if more else []
    said += [f"it renames the tensors of {_listed(dropped)}, and drops them"] if dropped and not said else []
    return "; ".join(said)


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _without_numbers(entry: PlanEntry) -> Pair:
    A, B = (torch.empty(shape, device="meta") for shape in (entry.shape_a, entry.shape_b))
    magnitude = torch.empty(entry.shape_b[0], device="meta") if entry.variant == "dora" else None
    return Pair(A, B, entry.alpha, entry.kind, entry.scale_rule, magnitude)


def _placed(config: Any, owner: Any, adapter: Adapter) -> tuple[set[str], list[str]]:
    """The paths on which PEFT puts pairs, those of experts by parameter, and the modules whose pairs it does not fill."""
    with _quiet():
        import peft
        from peft.tuners.lora import LoraLayer, ParamWrapper
        from peft.utils.save_and_load import set_peft_model_state_dict

        config = plain_config(config)  # a copy, into which transformers writes
        config._attn_implementation = "eager"
        with torch.device("meta"):
            outline = build_native(owner, config)
            settings = peft.PeftConfig.from_peft_type(**json.loads(config_text(adapter, modules_to_save=[])))
            wrapped = peft.PeftModel(outline, settings)
        found = set()
        for path, module in wrapped.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                name = module.parameter_name if isinstance(module, ParamWrapper) else WEIGHT
                outer = path.replace(_NESTED, "")
                found.add(outer if name == WEIGHT else f"{outer}.{name}")
        lacking = [name for name in set_peft_model_state_dict(wrapped, peft_tensors(adapter)).missing_keys if _FACTOR in name]
        return found, sorted({name.partition(_FACTOR)[0].removeprefix(_ROOT).replace(_NESTED, "") for name in lacking})


@dataclass(frozen=True)
class _Owner:
    """A model class with the call of transformers' Auto classes."""

    of: Any

    def from_config(self, config: Any, *, trust_remote_code: bool = False) -> Any:
        """The model of `config`."""
        return self.of._from_config(config)


def compare_with_peft(text: TextModel, name: str, folder: Path, rows: Sequence[Example]) -> PeftDifference:
    """Compares the logits of the adapter `name` on `text` with those of the adapter in `folder`, loaded by PEFT on the same base.

    `text` is used up: it is cast to fp32, and PEFT's layers stay in it. Raises what PEFT raises.
    """
    ids = [torch.from_numpy(row.ids[:TOKENS]).to(text.device, torch.int64) for row in rows[:ROWS]]
    unfuse(text.model)
    set_attention(text.model, "eager")
    text.model.float().eval()
    use_products(text.model, torch.float32)
    activate(text.model, name)
    ours = _logits(text.model, ids)
    activate(text.model, None)
    base = _logits(text.model, ids)
    longer = any(isinstance(part, TrainedRows) for _, part in adapter_parts(text.model, name))
    eject(text.model, name)
    if longer and len(text.tokenizer) > text.model.get_input_embeddings().weight.shape[0]:
        text.model.resize_token_embeddings(len(text.tokenizer), mean_resizing=False)
    with _quiet():
        import peft

        theirs = _logits(peft.PeftModel.from_pretrained(text.model, folder).eval(), ids)
    shown = base.shape[-1]  # without the rows of new tokens
    routed = any(modules.expert_stacks(module) for module in text.model.modules())
    both = min(ours.shape[-1], theirs.shape[-1])
    off, largest = _size(theirs[:, :both] - ours[:, :both], routed), float(ours.abs().max())
    effect = _size(ours[:, :shown] - base, routed)
    hidden = effect * SHARE < ROUNDING * largest
    return PeftDifference(len(ours), off / max(largest, _TINY), None if hidden else off / effect, routed)


def _size(difference: Tensor, routed: bool) -> float:
    """The largest number of a difference (tokens, vocabulary), or that of the median token: rounding may choose other experts."""
    largest = difference.abs().amax(1)
    return float(largest.median() if routed else largest.max())


def _logits(model: Any, ids: Sequence[Tensor]) -> Tensor:
    """The logits (tokens, vocabulary) of each row on its own, in fp32 on the CPU."""
    with torch.no_grad():
        return torch.cat([cast(Tensor, model(input_ids=row[None], use_cache=False).logits[0]).float().cpu() for row in ids])


@contextmanager
def _quiet() -> Iterator[None]:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
