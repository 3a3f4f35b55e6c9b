"""Reads, checks and writes PEFT's adapter_config.json.

An unsupported key that changes what the adapter computes is refused by name and value, never dropped. Keys that only affected
training, or that the tensors on disk make redundant, are ignored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakeet.core.adapter import Adapter
from lorakeet.core.math import ScaleRule, alpha_for
from lorakeet.errors import ConfigError, Problems
from lorakeet.formats.components import of_image_model
from lorakeet.formats.files.json_object import parse_object, read_bytes
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.formats.peft.patterns import MOST, PLAIN, SIMPLER, Allowance, KeyPatterns, ends_of, pattern_problem
from lorakeet.formats.peft.renamed_targets import WEIGHT, as_parameter

CONFIG_NAME = "adapter_config.json"
LARGEST_CONFIG = 16 << 20  # bytes: ranks, alphas and targets of 30,000 modules by their whole paths take 8
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
_PLAIN_NAME = re.compile(r"[\w.-]+")
_MOST_SAVED, _MOST_EMBEDDINGS = 1000, 64  # whole modules, embeddings with trained rows: each is compared with every module
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
    layers: frozenset[int] = frozenset()  # layers_to_transform; empty for all
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_ids: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    base: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def scale_rule(self) -> ScaleRule:
        return "alpha/sqrt(rank)" if self.rslora else "alpha/rank"

    @cached_property
    def _allowance(self) -> Allowance:
        return Allowance()

    @cached_property
    def _ranks(self) -> KeyPatterns:
        return KeyPatterns("rank_pattern", self.rank_pattern, self._allowance)

    @cached_property
    def _alphas(self) -> KeyPatterns:
        return KeyPatterns("alpha_pattern", self.alpha_pattern, self._allowance)

    @cached_property
    def _names(self) -> Mapping[str, frozenset[str]]:
        """The names of each setting that may be a list."""
        return {key: frozenset(names) for key in ("target_modules", "exclude_modules") if (names := getattr(self, key))}

    @cached_property
    def _parameters(self) -> Mapping[str, list[str]]:
        """The parameters that target_parameters names, by the end of their module's path."""
        found: dict[str, list[str]] = {}
        for target in self.target_parameters:
            module, _, name = target.rpartition(".")
            found.setdefault(module, []).append(name)
        return found

    def rank_of(self, path: str) -> int:
        """The rank of the pair at `path`: the first matching key of rank_pattern, or r."""
        return next((int(rank) for _, rank in self._ranks.matching(path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the pair at `path`: that of the matching keys of alpha_pattern, or lora_alpha.

        ConfigError if matching keys disagree: PEFT takes the first, and JSON does not guarantee the order of keys.
        """
        values = self._alphas.matching(path)
        if len({value for _, value in values}) > 1:
            said = ", ".join(f"{key[:80]!r} says {value:g}" for key, value in values[:10])
            raise ConfigError(
                f"{CONFIG_NAME}: alpha_pattern has keys that disagree on {path}: {said}. Keep the one that it was trained with."
            )
        return next((value for _, value in values), self.alpha)

    @property
    def all_linear(self) -> bool:
        """True if the targets are all linear layers, in upper or lower case, as in PEFT."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, path: str) -> bool:
        """True if PEFT gives the module at `path` a pair, by its rule; otherwise it ignores such a pair in the file.

        ConfigError for a regular expression that may take for ever.
        """
        if self.exclude_modules and self._named("exclude_modules", path):
            return False
        for name in self.modules_to_save:
            apart = _PLAIN_NAME.fullmatch(name) and max(name.split("."), key=len) not in path  # whatever its dots stand for
            if not apart and self._allowance.match(rf"(^|.*\.){name}($|\..*)", path, name, "modules_to_save"):
                return False
        if self.all_linear:
            return path.rpartition(".")[2] != "lm_head"
        if not self._named("target_modules", path):
            return False
        if isinstance(self.target_modules, str) or path in self._names["target_modules"]:
            return True  # and layers_to_transform has no effect in PEFT
        return not self.layers or self._layer_of(path) in self.layers

    def _layer_of(self, path: str) -> int | None:
        """The number of the layer that holds the module at `path`, by PEFT's rule."""
        match: Any = None
        for pattern in self.layers_pattern:
            used = rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
            match = match or self._allowance.match(used, path, pattern, "layers_pattern")
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        return int(match["idx"]) if match else None

    def _named(self, key: str, path: str) -> bool:
        """True if the setting `key` has the module at `path`: by regular expression, or as an end of it."""
        names = getattr(self, key)
        if isinstance(names, str):
            return self._allowance.match(rf"(?:{names})\Z", path, names, key) is not None
        return any(end in self._names[key] for end in ends_of(path)) if names else False

    def parameters_at(self, path: str) -> set[str]:
        """The parameters of the module at `path` that target_parameters names."""
        return {name for end in ("", *ends_of(path)) for name in self._parameters.get(end, ())}


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
    return read_bytes(folder / CONFIG_NAME, expected=_EXPECTED, most=LARGEST_CONFIG)


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
    _check_lengths(data, path, problems)
    tokens = data.get("trainable_token_indices")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [[] if tokens is None else tokens]
    if not all(isinstance(ids, list) and all(_whole(i) and i < 2**31 for i in ids) and len({*ids}) == len(ids) for ids in lists):
        problems.add(
            f"{path}: trainable_token_indices is {tokens!r}; expected token ids of 0 or more, each once, or lists of them by "
            "embedding name."
        )


def _check_lengths(data: dict[str, Any], path: object, problems: Problems) -> None:
    """Bounds the lists of which every entry is compared with every module."""
    for name, most in (("modules_to_save", _MOST_SAVED), ("layers_pattern", MOST), ("trainable_token_indices", _MOST_EMBEDDINGS)):
        given = data.get(name)
        if isinstance(given, dict if most == _MOST_EMBEDDINGS else list) and len(given) > most:
            problems.add(f"{path}: {name} has {len(given):,} entries; expected at most {most:,}. {_AGAIN}")


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
    if (count := sum(PLAIN.fullmatch(key) is None for key in pattern)) > MOST:
        problems.add(f"{path}: {name} has {count:,} regular expressions; expected at most {MOST}. {SIMPLER}")
        return
    for key, value in pattern.items():
        if not good(value):
            problems.add(f"{path}: {name} says {value!r} for {key[:80]!r}; expected {words}. {_AGAIN}")
        if not PLAIN.fullmatch(key) and (wrong := pattern_problem(key, rf"(.*\.)?({key})$")):
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
        layers=frozenset(layers if isinstance(layers, list) else () if layers is None else (int(layers),)),
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
