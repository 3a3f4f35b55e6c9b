"""Reads, checks and writes PEFT's adapter_config.json.

An unsupported key that changes what the adapter computes is refused by name and value, never dropped. Keys that only affected
training, or that the tensors on disk make redundant, are ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.core.adapter import Adapter
from lorakeet.core.math import ScaleRule, alpha_for
from lorakeet.core.spec import pattern_value
from lorakeet.errors import ConfigError, Problems
from lorakeet.formats.components import of_image_model
from lorakeet.formats.files.json_object import parse_object, read_bytes
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.formats.peft.renamed_targets import WEIGHT, as_parameter

CONFIG_NAME = "adapter_config.json"
LARGEST_SCALE = 3.4028234663852886e38  # in fp32
ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"  # in PEFT, for an adapter without pairs

# Read: they decide kinds, ranks and scales, or are names.
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out",
    "target_modules", "target_parameters", "modules_to_save", "trainable_token_indices", "base_model_name_or_path",
    "task_type", "revision", "lora_dropout", "init_lora_weights", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
# Without effect on what a trained adapter computes: the tensors on disk say which modules have a pair, the rest was training.
_NO_EFFECT = {
    "auto_mapping", "peft_version", "inference_mode", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config",
    "runtime_config",
}  # fmt: skip
# Refused unless they have their default: each changes the function, or the model it belongs to.
_REFUSED = {
    "bias": "none", "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "monteclora_config": None, "megatron_config": None, "ensure_weight_tying": False,
}  # fmt: skip
# Initialisations that do not change the base weights. "eva" and "mica" only read them.
_HARMLESS_INITS = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})
_EXPECTED = "the configuration of an adapter in PEFT's layout"


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what the tensors mean."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()  # layers_to_transform; empty for all
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_ids: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    base: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def scale_rule(self) -> ScaleRule:
        return "alpha/sqrt(rank)" if self.rslora else "alpha/rank"

    def rank_of(self, path: str) -> int:
        """The rank of the pair at `path`: the first matching key of rank_pattern, or r."""
        return int(pattern_value(dict(self.rank_pattern), path) or self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the pair at `path`: that of the matching keys of alpha_pattern, or lora_alpha.

        ConfigError if matching keys disagree: PEFT takes the first, and JSON does not guarantee the order of keys.
        """
        values = {key: value for key, value in self.alpha_pattern.items() if pattern_value({key: value}, path) is not None}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{key!r} says {value:g}" for key, value in values.items())
            raise ConfigError(
                f"{CONFIG_NAME}: alpha_pattern has keys that disagree on {path}: {said}. Keep the one that it was trained with."
            )
        return next(iter(values.values()), self.alpha)

    @property
    def all_linear(self) -> bool:
        """True if the targets are all linear layers, in upper or lower case, as in PEFT."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, path: str) -> bool:
        """True if PEFT gives the module at `path` a pair, by its rule; otherwise it ignores such a pair in the file.

        ConfigError for a regular expression that may take for ever.
        """
        if self.exclude_modules and _named(self.exclude_modules, path, "exclude_modules"):
            return False
        for name in self.modules_to_save:
            if _matched(rf"(^|.*\.){name}($|\..*)", path, name, "modules_to_save"):
                return False
        if self.all_linear:
            return path.rpartition(".")[2] != "lm_head"
        if isinstance(self.target_modules, str) or path in self.target_modules:  # then layers_to_transform has no effect in PEFT
            return _named(self.target_modules, path, "target_modules")
        return _named(self.target_modules, path, "target_modules") and (not self.layers or self._layer_of(path) in self.layers)

    def _layer_of(self, path: str) -> int | None:
        """The number of the layer that holds the module at `path`, by PEFT's rule."""
        match = None
        for pattern in self.layers_pattern:
            match = match or _matched(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path, pattern, "layers_pattern")
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        return int(match["idx"]) if match else None


def _named(names: tuple[str, ...] | str, path: str, key: str) -> bool:
    """True if `names`, the value of `key`, has the module at `path`: by regular expression, or as an end of it."""
    if isinstance(names, str):
        return _matched(rf"(?:{names})\Z", path, names, key) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _matched(used: str, path: str, pattern: str, key: str) -> re.Match[str] | None:
    """The match of `used`, made from the value `pattern` of `key`; ConfigError if it may take for ever or is none."""
    if wrong := pattern_problem(pattern, used, most_steps=math.inf):
        raise ConfigError(f"{CONFIG_NAME}: {key} is {pattern[:80]!r}, {wrong}")
    return re.match(used, path)


LONGEST = 1 << 20  # bytes of a configuration that is cached
_KNOWN: LruCache[bytes, PeftConfig] = LruCache(8)


def read_peft_config(folder: Path, raw: bytes) -> PeftConfig:
    """The configuration in `folder`, whose bytes are `raw`. It is cached and must not be changed.

    DataError if the file is none, ConfigError listing every key that is refused.
    """
    path = folder / CONFIG_NAME
    if len(raw) > LONGEST:
        return parse_config(parse_object(raw, path, expected=_EXPECTED), path)
    return _KNOWN.get_or_make(raw, lambda: parse_config(parse_object(raw, path, expected=_EXPECTED), path))


def config_bytes(folder: Path) -> bytes:
    """The bytes of the configuration in `folder`; DataError if it cannot be read."""
    return read_bytes(folder / CONFIG_NAME, expected=_EXPECTED)


def parse_config(data: dict[str, Any], path: object) -> PeftConfig:
    """Parses a mapping of PEFT's `LoraConfig`; `path` is its name in errors. ConfigError lists all of them."""
    problems = Problems(f"{path} describes an adapter that cannot be read")
    _refuse(data, path, problems)
    _check_values(data, path, problems)
    problems.raise_if_any()
    return _parse(data)


def _refuse(data: dict[str, Any], path: object, problems: Problems) -> None:
    if str(data.get("peft_type", "LORA")).upper() != "LORA":
        problems.add(f"{path}: peft_type is {data['peft_type']!r}; only LORA is supported.")
    for key, default in _REFUSED.items():
        if data.get(key, default) not in (default, *_EMPTY):
            problems.add(f"{path}: {key} is {data[key]!r}; only {default!r} is supported. Train the adapter again without it.")
    for key in sorted(set(data) - _READ - _NO_EFFECT - set(_REFUSED)):
        if data[key] not in _EMPTY:
            problems.add(
                f"{path}: the key {key} = {data[key]!r} is not known here, so what it changes would be lost. "
                "Set it to null if it has no effect on a trained adapter."
            )
    if data.get("use_dora") and data.get("lora_bias"):
        problems.add(
            f"{path}: use_dora and lora_bias are both True; PEFT counts the bias into the rows' lengths, which is not supported."
        )
    start = data.get("init_lora_weights", True)
    if str(start).lower() not in _HARMLESS_INITS and start is not None:
        problems.add(
            f"{path}: init_lora_weights is {start!r}. PEFT took the start out of the base weights, so this adapter belongs to a "
            "base that differs from the one on disk. Save it again in PEFT with path_initial_model_for_weight_conversion, "
            "which makes it a plain LoRA of twice the rank."
        )


def _check_values(data: dict[str, Any], path: object, problems: Problems) -> None:
    for key, what in (("r", "rank"), ("lora_alpha", "alpha")):
        if key not in data:
            problems.add(f"{path} has no {key}, so the {what} and with it the scale are unknown. Fetch the file again.")
    rank, alpha = data.get("r", 8), data.get("lora_alpha", 8)
    if not _rank(rank):
        problems.add(f"{path}: r is {rank!r}; expected a whole number of 1 or more.")
    if not _number(alpha):
        problems.add(f"{path}: lora_alpha is {alpha!r}; expected a finite number. {_AGAIN}")
    if not _number(dropout := data.get("lora_dropout") or 0.0):
        problems.add(f"{path}: lora_dropout is {dropout!r}; expected a finite number or null.")
    _check_pattern(data, "rank_pattern", (_rank, "a whole number of 1 or more"), path, problems)
    _check_pattern(data, "alpha_pattern", (_number, "a finite number"), path, problems)
    for name in ("target_parameters", "modules_to_save"):
        if not _texts(data.get(name) or []):
            problems.add(f"{path}: {name} is {data[name]!r}; expected a list of names or null.")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if not isinstance(data.get(name), str) and not _texts(data.get(name) or []):
            problems.add(f"{path}: {name} is {data[name]!r}; expected a list of names or a text.")
    layers = [] if data.get("layers_to_transform") is None else data["layers_to_transform"]
    if not _whole(layers) and not (isinstance(layers, list) and all(map(_whole, layers))):
        problems.add(f"{path}: layers_to_transform is {layers!r}; expected the number of a layer, or a list of them.")
    tokens = data.get("trainable_token_indices")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [[] if tokens is None else tokens]
    if not all(isinstance(ids, list) and all(_whole(i) and i < 2**31 for i in ids) and len({*ids}) == len(ids) for ids in lists):
        problems.add(
            f"{path}: trainable_token_indices is {tokens!r}; expected token ids of 0 or more, each once, or lists of them by "
            "embedding name."
        )


_AGAIN = "Put in the value that it was trained with, or fetch the file again."


def _check_pattern(
    data: dict[str, Any], name: str, expected: tuple[Callable[[Any], bool], str], path: object, problems: Problems
) -> None:
    """Checks the table `name` of values by regular expression; `expected`: a test of a value, and its words."""
    good, words = expected
    pattern = data.get(name) or {}
    if not isinstance(pattern, dict):
        problems.add(f"{path}: {name} is {pattern!r}; expected numbers by regular expression.")
        return
    for key, value in pattern.items():
        if not good(value):
            problems.add(f"{path}: {name} says {value!r} for {key[:80]!r}; expected {words}. {_AGAIN}")
        if wrong := pattern_problem(key, rf"(.*\.)?({key})$"):
            problems.add(f"{path}: {name} has the key {key[:80]!r}, {wrong}")


def _number(value: Any) -> bool:
    """True if `value` is a finite number in fp32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_SCALE


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rank(value: Any) -> bool:
    return _number(value) and value >= 1 and int(value) == value


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _parse(data: dict[str, Any]) -> PeftConfig:
    tokens = data.get("trainable_token_indices")
    if isinstance(tokens, dict):
        tokens = {name: tuple(ids) for name, ids in tokens.items()}
    elif tokens is not None:
        tokens = tuple(tokens)
    targets, excluded = data.get("target_modules") or [], data.get("exclude_modules") or []
    layers, pattern = data.get("layers_to_transform"), data.get("layers_pattern") or []
    metadata = {"task_type": str(data.get("task_type") or "")}
    if data.get("revision"):
        metadata["revision"] = str(data["revision"])
    if data.get("lora_dropout"):
        metadata["lora_dropout"] = repr(float(data["lora_dropout"]))
    return PeftConfig(
        rank=int(data.get("r", 8)),
        alpha=float(data.get("lora_alpha", 8)),
        rank_pattern={key: int(value) for key, value in (data.get("rank_pattern") or {}).items()},
        alpha_pattern={key: float(value) for key, value in (data.get("alpha_pattern") or {}).items()},
        rslora=bool(data.get("use_rslora")),
        dora=bool(data.get("use_dora")),
        lora_bias=bool(data.get("lora_bias")),
        fan_in_fan_out=bool(data.get("fan_in_fan_out")),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        target_parameters=tuple(data.get("target_parameters") or ()),
        exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded),
        layers=tuple(layers) if isinstance(layers, list) else () if layers is None else (int(layers),),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
        modules_to_save=tuple(data.get("modules_to_save") or ()),
        token_ids=tokens,
        base=str(data.get("base_model_name_or_path") or ""),
        metadata=metadata,
    )


def config_text(adapter: Adapter, *, modules_to_save: list[str]) -> str:
    """adapter_config.json for `adapter`, the same text for the same adapter.

    r and lora_alpha are the most frequent values; other pairs are in rank_pattern and alpha_pattern by their whole path, so that
    PEFT matches no other. The scale rule, DoRA and the bias are one switch for the whole adapter in PEFT: a pair with the other
    scale rule gets the alpha that gives its scale.
    """
    rule = _frequent([pair.scale_rule for pair in adapter.pairs.values()], "alpha/rank")
    ranks = {path: pair.rank for path, pair in adapter.pairs.items()}
    alphas = {
        path: pair.alpha if pair.scale_rule == rule else alpha_for(pair.scale, pair.rank, rule)
        for path, pair in adapter.pairs.items()
    }
    rank, alpha = _frequent(list(ranks.values()), 8), _frequent(list(alphas.values()), 8.0)
    kinds = {pair.kind for pair in adapter.pairs.values()}
    names = {path: f"{path}.{WEIGHT}" if as_parameter(adapter, path) else path for path in adapter.pairs}
    of_parameters = {path for path, pair in adapter.pairs.items() if pair.kind == "experts" or names[path] != path}
    modules = sorted(set(adapter.pairs) - of_parameters)
    parameters = sorted(names[path] for path in of_parameters)
    task = adapter.metadata.get("task_type", "" if "conv2d" in kinds or of_image_model(adapter) else "CAUSAL_LM")
    data: dict[str, Any] = {
        "alpha_pattern": {_exact_pattern(names[path]): _plain(value) for path, value in sorted(alphas.items()) if value != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base or None,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _plain(alpha),
        "lora_dropout": float(adapter.metadata.get("lora_dropout", 0.0)),
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_exact_pattern(names[path]): value for path, value in sorted(ranks.items()) if value != rank},
        "revision": adapter.metadata.get("revision"),
        "target_modules": modules if modules or parameters else NO_TARGETS,
        "task_type": task or None,
        "use_dora": any(pair.magnitude is not None for pair in adapter.pairs.values()),
        "use_rslora": rule == "alpha/sqrt(rank)",
    }
    if parameters:
        data["target_parameters"] = parameters
    if any(pair.bias is not None for pair in adapter.pairs.values()):
        data["lora_bias"] = True
    if adapter.token_rows:
        data["trainable_token_indices"] = {path: list(rows.ids) for path, rows in sorted(adapter.token_rows.items())}
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _frequent(values: list[Any], default: Any) -> Any:
    """The most frequent value; of equally frequent ones the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value)) if counts else default


def _plain(value: float) -> int | float:
    """A whole number without its ".0", which some readers of lora_alpha cannot parse."""
    return int(value) if float(value).is_integer() else value


def _exact_pattern(path: str) -> str:
    """A key that PEFT's `(.*\\.)?(KEY)$` matches to the whole `path` only, not to longer paths that end with it."""
    return "^" + re.escape(path)


def check_writable(adapter: Adapter) -> None:
    """Raises ConfigError listing everything in `adapter` that PEFT's layout cannot hold."""
    problems = Problems("The adapter cannot be written in PEFT's layout")
    dora = [path for path, pair in adapter.pairs.items() if pair.magnitude is not None]
    plain = [path for path, pair in adapter.pairs.items() if pair.magnitude is None]
    if dora and plain:
        problems.add(
            f"{len(dora)} pairs are DoRA and {len(plain)} are not ({plain[0]}, …); PEFT knows DoRA for the whole adapter only. "
            "Give every pair the same variant, or merge the adapter into its base."
        )
    biased = any(pair.bias is not None for pair in adapter.pairs.values())
    for path, pair in adapter.pairs.items():
        if biased and pair.kind in ("experts", "embedding"):
            problems.add(f"{path} is of kind {pair.kind}, which PEFT cannot hold in an adapter with a bias in its pairs.")
        if pair.magnitude is not None and (pair.kind in ("embedding", "experts") or pair.bias is not None):
            what = f"of kind {pair.kind}" if pair.bias is None else "with a bias"
            problems.add(f"{path} is a DoRA pair {what}, which is not supported.")
        if pair.kind == "experts" and "." not in path:
            problems.add(f"{path} is a parameter of the whole model; PEFT can only name parameters of a module inside it.")
        if path in adapter.token_rows:
            problems.add(f"{path} has both a pair and trained token rows, which PEFT cannot hold together.")
    for path, rows in adapter.token_rows.items():
        if len(rows.ids) != rows.rows.shape[0]:
            problems.add(f"{path} has {len(rows.ids)} token ids and {rows.rows.shape[0]} rows.")
    problems.raise_if_any()


MOST_STEPS = 1e8  # three repetitions, with some alternatives
_LONGEST_KEY = 1000
_STEPS_OF_A_REPETITION = 128.0
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?P<\w+>|\(\?<?[:=!]|\(\?[aimsuL-]+[:)]|\(\??|(?P<repeat>(?:[*+?]|\{(?:\d+,?\d*|,\d*)\})[?+]?)|.",
    re.DOTALL,
)


def pattern_problem(key: str, used: str, *, most_steps: float = MOST_STEPS) -> str:
    """What is wrong with the regular expression `key`, which is matched as `used`; an empty string if it is safe.

    Python's matcher backtracks, so (a+)+$ on a path of 60 characters takes practically for ever. An adapter's file may have such
    a key, by malice or by accident. `most_steps`: infinity accepts all but repetitions within repetitions.
    """
    if len(key) > _LONGEST_KEY:
        return f"which is {len(key):,} characters long; expected at most {_LONGEST_KEY:,}. Split it into several."
    try:
        re.compile(key)
        re.compile(used)
    except (re.error, OverflowError, RecursionError) as error:
        return f"which is not a regular expression: {error}."
    if (steps := steps_of(key)) > most_steps or steps == math.inf:
        return (
            "which may take for ever to match: expected at most three repetitions in a row, no repetition of a group that holds "
            "repetitions or alternatives, and no rare kind of (?…). Use simpler keys, such as 'layers.0.q_proj' for one module."
        )
    return ""


def steps_of(key: str) -> float:
    """An upper bound of the ways to match the regular expression `key` on a long path; infinite for nested repetitions.

    Consecutive parts multiply, alternatives add, and a repetition counts as the length of a path.
    """
    groups = [(0.0, 1.0, 1.0)]  # by open group: finished alternatives, the present one without its last part, that part
    for match in _TOKEN.finditer(key):
        token, (done, before, last) = match[0], groups[-1]
        if match["repeat"]:
            low, high = _times(token)
            if high > 1 and last > 1:
                return math.inf
            last = last + 1 if (low, high) == (0, 1) else max(last, min(high - low + 1, _STEPS_OF_A_REPETITION))
            groups[-1] = (done, before, last)
        elif token == "|":
            groups[-1] = (done + before * last, 1.0, 1.0)
        elif token == ")":
            groups.pop()
            outer_done, outer_before, outer_last = groups[-1]
            groups[-1] = (outer_done, outer_before * outer_last, done + before * last)
        elif token == "(?":
            return math.inf
        elif token.startswith("(") and not token.endswith(")"):
            groups.append((0.0, 1.0, 1.0))
        else:
            groups[-1] = (done, before * last, 1.0)
    done, before, last = groups[0]
    return done + before * last


def _times(token: str) -> tuple[float, float]:
    """The least and the largest number of repetitions of the quantifier `token`."""
    if token[0] != "{":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[token[0]]
    low, comma, high = token.rstrip("?+")[1:-1].partition(",")
    least = float(low or 0)
    return least, float(high or math.inf) if comma else least
