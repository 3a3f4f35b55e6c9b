"""The settings of LoRA: `LoraSpec`, the `lora:` part of a run file. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, Literal, TypeVar

from lorakeet.errors import Problems, nearest
from lorakeet.setting import setting
from lorakeet.settings import require_types

FACTORED = ("pissa", "olora")  # starts from factors of the frozen weight, whose initial values are stored too (core/lowrank)
SUM = "(?#sum)"  # a comment in the pattern of a rank or alpha that is of an earlier adapter and the one on top of it together
_OF_PEFT = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "start", "use_dora": "variant",
    "use_rslora": "scale_rule", "modules_to_save": "extra_modules", "layers_to_transform": "layers",
}  # fmt: skip  # names of LoraConfig
SpecT = TypeVar("SpecT")
MEASURED = ("gradient", "activation")  # starts whose A is measured on training rows (ranks/score)


def naming_its_settings(cls: type[SpecT]) -> type[SpecT]:
    """The dataclass `cls`, whose TypeError for an unknown argument names the setting that is meant, also for PEFT's names."""
    made = cls.__init__

    @wraps(made)
    def __init__(self: SpecT, *values: Any, **settings: Any) -> None:
        known = [one.name for one in fields(cls)]  # type: ignore[arg-type]
        if unknown := next((name for name in settings if name not in known), None):
            meant = _OF_PEFT.get(unknown)
            guess = f" It is {meant} here: lk.Lora({meant}=…)." if meant else nearest(unknown, known)
            raise TypeError(f"lk.Lora has no argument {unknown!r}.{guess} It takes {', '.join(known)}.")
        made(self, *values, **settings)

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]
    return cls


@naming_its_settings
@dataclass(frozen=True)
class LoraSpec:
    """Which matrices get a low-rank pair, of what rank, scale and start; `lk.Lora` in Python.

    `rank` is 16 and `alpha` is 32 unless they are given, whatever the other is: the scale alpha/rank is 2 then, and 8 with
    rank 4. PEFT calls them r and lora_alpha. Raises TypeError for a name that is no setting.
    """

    rank: int = setting(16, "Rank of each pair: A is (rank, in), B is (out, rank).")
    alpha: float = setting(32.0, "Scales the update by alpha/rank, or by alpha/√rank with rsLoRA.")
    dropout: float = setting(0.0, "Dropout of the pair's input in training, 0 to less than 1.")
    scale_rule: Literal["alpha/rank", "alpha/sqrt(rank)"] = setting(
        "alpha/rank", "How alpha and rank give the scale; alpha/sqrt(rank) is rsLoRA."
    )
    variant: Literal["lora", "dora"] = setting(
        "lora", "lora, or dora: a trained magnitude for each row of the weight (arXiv 2402.09353)."
    )
    start: Literal["kaiming", "gaussian", "pissa", "olora", "orthogonal", "gradient", "activation"] = setting(
        "kaiming", "Initialisation: B = 0 (kaiming, gaussian, gradient, activation), pissa (SVD), olora (QR) or orthogonal."
    )
    target_modules: tuple[str, ...] = setting(
        ("all-linear",),
        "Module names or path endings, or all-linear, attention, mlp, conv; embeddings and lm_head only if named.",
    )
    exclude_modules: tuple[str, ...] = setting(
        (), "Modules to leave out: names, path endings or regular expressions of the whole path."
    )
    layers: str = setting("all", "Blocks to adapt: all, a range such as 0-11, a list such as 0,5,9, or top:8.")
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank by regular expression on the end of a module's path; the first match wins."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Alpha by regular expression on the end of a module's path; the first match wins."},
    )
    continue_from: str | None = setting(
        None, "Run or adapter folder whose adapter is trained further; its targets, ranks and alphas replace those given here."
    )
    on_top_of: str | None = setting(
        None, "Run or adapter folder whose adapter stays as it is; these pairs are trained on top, and the result is the sum."
    )
    extra_modules: tuple[str, ...] = setting((), "Modules trained in full beside the pairs, such as a classification head.")
    new_tokens: tuple[str, ...] = setting((), "Tokens to add to the vocabulary; only their embedding rows are trained.")

    def __post_init__(self) -> None:
        require_types(self)

    @property
    def earlier(self) -> str | None:
        """The run or adapter folder that training begins with; None without one."""
        return self.continue_from if self.on_top_of is None else self.on_top_of

    def validate(self) -> list[str]:
        """Every problem of these settings in words; empty when they can be used."""
        found: list[str] = []
        if self.rank < 1:
            found.append(f"lora.rank is {self.rank}; it must be 1 or more (0 would train nothing). Try 8 or 16.")
        if self.alpha <= 0:
            found.append(f"lora.alpha is {self.alpha:g}; it must be above 0. A common choice is twice the rank.")
        if not 0 <= self.dropout < 1:
            found.append(f"lora.dropout is {self.dropout:g}; it must be at least 0 and below 1.")
        if not self.target_modules and not self.extra_modules and not self.new_tokens:
            found.append("lora.target_modules is empty, so nothing would be trained. Use all-linear or name modules.")
        if self.start == "orthogonal" and self.rank % 2:
            found.append(f"lora.start orthogonal needs an even rank; lora.rank is {self.rank}.")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            found += [f"lora.{name} {key!r} is {value}; it must be above 0." for key, value in pattern.items() if value <= 0]
            found += [problem for key in pattern for problem in _regex_problems(f"lora.{name}", key)]
        found += _layer_problems(self.layers)
        return found + self._beside_earlier()

    def _beside_earlier(self) -> list[str]:
        """What cannot stand beside an earlier adapter."""
        if self.continue_from is not None and self.on_top_of is not None:
            return [
                f"lora.continue_from is {self.continue_from} and lora.on_top_of {self.on_top_of}: the first goes on training the "
                "earlier adapter, the second keeps it as it is. Leave one of them out."
            ]
        if self.earlier is None:
            return []
        name, why = ("on_top_of", "would change the earlier adapter too") if self.on_top_of else ("continue_from", "")
        anew = [f"lora.start {self.start}"] * (self.start != "kaiming")
        anew += ["lora.extra_modules or lora.new_tokens"] * bool(self.extra_modules or self.new_tokens)
        both = [f"lora.dropout {self.dropout:g}"] * (self.dropout > 0)
        both += [f"lora.variant {self.variant}"] * (self.variant != "lora")
        beside = [(given, "begins anew") for given in anew] + [(given, why) for given in both if why]
        return [f"lora.{name} is {self.earlier}, beside {given}, which {does}. Leave one of them out." for given, does in beside]

    def check(self) -> None:
        """Raises ConfigError with every problem of `validate`."""
        problems = Problems("The LoRA settings cannot be used")
        for message in self.validate():
            problems.add(message)
        problems.raise_if_any()


def _regex_problems(where: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{where} {pattern!r} is not a regular expression: {error}."]
    return []


_LAYERS = re.compile(r"all|top:[1-9]\d*|\d+(-\d+)?(,\d+(-\d+)?)*")


def _layer_problems(text: str) -> list[str]:
    plain = text.replace(" ", "")
    if _LAYERS.fullmatch(plain):
        backward = [part for part in plain.split(",") if (ends := part.split("-"))[0].isdigit() and int(ends[0]) > int(ends[-1])]
        return [f"lora.layers has the range {part}, which ends before it begins; turn it round." for part in backward]
    return [f"lora.layers is {text!r}; expected all, a range such as 0-11, a list such as 0,5,9, or top:8."]


def layers_chosen(text: str, count: int) -> set[int]:
    """The block numbers that `text` (see `LoraSpec.layers`) means in a model of `count` blocks; some may not exist."""
    text = text.replace(" ", "")
    if text == "all":
        return set(range(count))
    if text.startswith("top:"):
        return set(range(max(0, count - int(text[4:])), count))
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        chosen |= set(range(int(first), int(last or first) + 1))
    return chosen


def pattern_value(pattern: dict[str, int] | dict[str, float], path: str) -> float | None:
    """The value of the first key that matches the end of `path` at a dot (PEFT's rule: `(.*\\.)?(KEY)$`), or None."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return None
