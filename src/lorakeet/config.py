"""The run file: `RunConfig` composes the settings of every part; reads and writes YAML. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from lorakeet.core.spec import LoraSpec
from lorakeet.data.spec import DataSpec
from lorakeet.disk import open_buffered
from lorakeet.errors import ConfigError, Problems, require_path, unreadable
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.files.yaml_mapping import LARGEST, RESOLVERS, parse_yaml
from lorakeet.memory.spec import MemorySpec
from lorakeet.models.spec import ModelSpec
from lorakeet.ranks.spec import RanksSpec
from lorakeet.registry import KindDeclaration, declarations, declared, own_kinds
from lorakeet.setting import setting
from lorakeet.settings import load, override, require_types, to_mapping
from lorakeet.train.spec import TrainSpec

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RunConfig", "dump_yaml", "read_run", "read_yaml"]

Spec = TypeVar("Spec")


def _kind_help() -> str:
    kinds = [f"{one.name} ({one.help})" for one in declarations().values() if not one.over]
    return f"Kind of model: {' or '.join([', '.join(kinds[:-1]), kinds[-1]])}."


@dataclass(frozen=True)
class _CommonSettings:
    """The settings that every kind of run has."""

    model: ModelSpec = field(default_factory=ModelSpec, metadata={"help": "The base model.", "shorthand": "path"})
    lora: LoraSpec = field(default_factory=LoraSpec, metadata={"help": "The adapter."})
    ranks: RanksSpec = field(default_factory=RanksSpec, metadata={"help": "How ranks are chosen.", "shorthand": "choose"})
    data: DataSpec = field(default_factory=DataSpec, metadata={"help": "The rows.", "shorthand": "train"})
    train: TrainSpec = field(default_factory=TrainSpec, metadata={"help": "Training."})
    memory: MemorySpec = field(default_factory=MemorySpec, metadata={"help": "The memory budget.", "shorthand": "budget"})
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec, metadata={"help": "Evaluation."})
    kind: Literal[tuple(own_kinds())] = field(  # type: ignore[valid-type]  # evaluated at each reading: of every kind
        default=own_kinds()[0], metadata={"help": _kind_help()}
    )
    out: str = setting("runs/lorakeet", "Folder of the run; it must not exist yet.")
    uncertified: bool = setting(
        False, "Begin with an earlier adapter whose content is not that of its certificate; results say so."
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for every section that is not of its class, such as a mapping: only `read_run` reads those."""
        problems = Problems("RunConfig cannot be made")
        for spec in fields(self):
            section, given = spec.default_factory, getattr(self, spec.name)
            if isinstance(section, type) and not isinstance(given, section):
                values = given if isinstance(given, Mapping) else {spec.metadata.get("shorthand", ""): given}
                inside = ", ".join(f"{name}={value!r}" for name, value in values.items() if name)
                problems.add(
                    f"{spec.name} is {given!r:.80}; expected a {section.__name__}. Make one: from {section.__module__} import "
                    f"{section.__name__}, then {spec.name}={section.__name__}({inside:.80})."
                )
        problems.raise_if_any()
        require_types(self)

    def changed(self, **sections: Mapping[str, Any]) -> Self:
        """Returns the same run with other values of some settings, by section: changed(lora={"rank": 8})."""
        return replace(self, **{name: replace(getattr(self, name), **values) for name, values in sections.items()})

    def section(self, spec: type[Spec]) -> Spec:
        """Returns the part of the run file that is a `spec`, such as that of one kind."""
        return next(value for one in fields(self) if isinstance(value := getattr(self, one.name), spec))

    @property
    def declaration(self) -> KindDeclaration:
        """What the kind that carries the run out says of itself."""
        return declared(self.kind, self.train.registered.name)

    def validate(self) -> list[str]:
        """Returns a message for every conflict between parts."""
        found = [] if self.out.strip() else ["out is empty; name the folder that the run is written to, e.g. runs/first."]
        if self.ranks.choose == "auto" and self.lora.rank_pattern:
            count = len(self.lora.rank_pattern)
            found.append(f"ranks.choose is auto, but lora.rank_pattern gives {count} ranks. Leave one of them out.")
        prunes, lora = self.ranks.choose == "prune", self.lora  # pairs that are more than sums of rank-one terms are not pruned
        if prunes and lora.variant == "dora":
            found.append("ranks.choose is prune, but lora.variant is dora, whose magnitudes outlive a removed pair. Use lora.")
        if prunes and lora.start in ("pissa", "olora", "orthogonal"):
            found.append(
                f"ranks.choose is prune, but lora.start is {lora.start}, whose rank-one terms cannot be removed one by one. Use "
                "lora.start kaiming."
            )
        if self.lora.on_top_of is not None and (self.ranks.choose != "given" or self.train.weight_decay):
            what = f"ranks.choose {self.ranks.choose}" if self.ranks.choose != "given" else "train.weight_decay"
            found.append(f"lora.on_top_of is {self.lora.on_top_of}, beside {what}, which would change the earlier adapter too.")
        for one in declarations().values():
            found += one.conflicts(self)
        return found


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class RunConfig(_CommonSettings):
        """All settings of a fine-tuning run, with the same keys in YAML, in flags and in the saved run."""

else:
    RunConfig = make_dataclass(
        "RunConfig",
        [
            (name, one.spec, field(default_factory=one.spec, metadata={"help": one.help}))
            for declaration in declarations().values()
            for name, one in declaration.sections.items()
        ],
        bases=(_CommonSettings,),
        frozen=True,
        namespace={"__doc__": "All settings of a fine-tuning run, with the same keys in YAML, in flags and in the saved run.",
                   "__module__": __name__},
    )  # fmt: skip


def read_run(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Reads a run from a YAML file (or from the defaults); `overrides` maps dotted paths to text.

    Raises ConfigError that lists every problem of the file and the flags.
    """
    if path is not None:
        require_path(path)
    mapping = read_yaml(Path(path)) if path else {}
    for dotted, value in (overrides or {}).items():
        mapping = override(RunConfig, mapping, dotted, value)
    if isinstance(kind := mapping.get("kind"), str) and kind not in ("none", *own_kinds()):
        declared(kind)  # its sections would be unknown too
    origins = {dotted: f"flag --{dotted}" for dotted in overrides or {}}
    return load(RunConfig, mapping, where=str(path) if path else "the flags", origins=origins)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML (or JSON) file; an empty file is an empty mapping. Raises ConfigError."""
    try:
        with path.open("rb") if path.is_relative_to("/dev") else open_buffered(path) as file:  # a shell's own pipe is /dev/fd/N
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise ConfigError(f"{path} has more than {LARGEST:,} bytes; expected a run file. Is it the right file?")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        said = f"{path} does not exist (looked in {path.absolute().parent}). Give the path of a run file."
        raise ConfigError(said, code="file-missing", values={"path": str(path)}) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; expected a run file, such as {path / 'config.yaml'}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(unreadable(path, error)) from None
    content = parse_yaml(text, path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {content!r:.60}; expected keys such as 'model: …' and 'data: …' at the top.")
    return content


def dump_yaml(config: Any) -> str:
    """Returns a configuration, or a mapping of some of its keys, as a YAML run file; keys in the order of the dataclasses."""
    mapping = config if isinstance(config, Mapping) else to_mapping(config)
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads: the same plain values, lists on one line, texts of several lines as a block."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if "\n" not in data else "|" if data.strip() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, _pattern, _first in RESOLVERS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
