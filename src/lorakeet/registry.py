"""The kinds of runs by name: Lorakeet's own, and those of other packages, by their entry points `lorakeet.kinds`.

An entry point names a module with a `DECLARATION`, as the `__init__` of each folder in kinds/ does. That module is imported with
lorakeet.config, so that it must import neither that nor torch; what does the work is in the declaration's `module`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal  # noqa: F401  # of the annotation that train_settings makes

from lorakeet.errors import ConfigError, EnvironmentProblem, nearest
from lorakeet.setting import setting

GROUP = "lorakeet.kinds"
SECTIONS = ("model", "lora", "ranks", "data", "train", "memory", "evaluate")  # that every run file has
_TAKEN = (*SECTIONS, "kind", "out", "uncertified", "changed", "section", "declaration", "validate")  # names in RunConfig
OWN = {name: f"lorakeet.kinds.{folder}" for name, folder in (("text", "text"), ("preference", "preference"), ("image", "images"))}


@dataclass(frozen=True)
class Section:
    """A part of the run file that one kind brings: a dataclass of settings with defaults, and its help."""

    spec: type[Any]
    help: str


@dataclass(frozen=True)
class AddedVerb:
    """A command that one kind brings: its class of options, and "module:function" of its work (options, console=...)."""

    name: str
    summary: str
    options: type[Any]
    function: str
    checks: str = ""  # "module:function" (options) that raises what can be refused before torch is imported
    record: str = ""  # the file in its --out that lists samples, if it draws some: so the studio tries runs
    prompts: str = ""  # the setting whose first value is its prompt there


def _no_conflicts(*_: Any, **__: Any) -> list[str]:
    return []


START, BASE = "start", "base"  # what a run can be compared with: the model as training starts, or the base alone


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A value of train.objective, with what the trainer, the planner and the readers of rows need of it."""

    name: str
    answers: int = 1  # of each row, that a step computes
    only_read: int = 0  # of these; neither trained nor evaluated
    titles: tuple[str, ...] = ("One training row",)  # of the answers of the row that is shown
    nats: bool = True  # its loss is in nats a token
    rate_factor: float = 1.0  # of the default learning rate
    shapes: tuple[str, ...] = ()  # of the rows that it trains, by their names in data.format; empty: one answer, or none
    rows: str = ""  # "module:function" (rows, Objective, part, trained=bool): the rows as it takes them; DataError for others
    compared_with: Callable[[Any], str] = lambda train: ""  # TrainSpec → START, BASE, or the path of an adapter; empty: nothing
    varied: str = ""  # the setting of its loss that lorakeet tune can choose
    older: bool = False  # its runs can be older than the settings that kinds add to `train`, and are resumed

    def __str__(self) -> str:
        return f"train.objective is {self.name}"

    @property
    def one_answer(self) -> bool:
        """Whether it trains on the one answer that a row has."""
        return bool(self.name) and not self.shapes

    def taken(self, rows: Sequence[Any], part: str, *, trained: bool = True) -> tuple[Any, ...]:
        """The rows of a part as it takes them. Raises DataError for others, and for those that cannot be `trained`."""
        return tuple(function_at(self.rows)(rows, self, part, trained=trained) if self.rows else rows)


ANY = Objective(name="")  # of rows of any shape


@dataclass(frozen=True)
class TrainedObjective:
    """The part of the settings of training that is registered, as code without kinds sees it (`train_settings`)."""

    objective: str = ""

    @property
    def registered(self) -> Objective:
        """What is trained."""
        return objectives()[self.objective]


@dataclass(frozen=True, kw_only=True)
class KindDeclaration:
    """What a kind of run says of itself before anything big is imported.

    `module` has the `KIND` (kinds/protocol.RunKind) that carries a run out. `over`: it is the kind of this name with one of the
    `objectives` as train.objective; empty for a kind of its own. `trains` says in words what they train, and `train` is a
    dataclass of the settings that they add to the section of that name.
    """

    name: str
    help: str
    module: str
    over: str = ""
    objectives: tuple[Objective, ...] = ()
    trains: str = ""
    train: type[Any] | None = None
    sections: Mapping[str, Section] = field(default_factory=dict)
    text_model: bool = False  # its base is a causal language model: what opens one (runs/open_adapter) takes its runs
    instead: str = ""  # what to do where a text model is needed and this kind has none, in sentences
    lacks: Mapping[str, str] = field(default_factory=dict)  # what else it cannot do, such as "seeds" → why, and what instead
    rows_called: str = "rows"  # in the plural
    rows_help: str = ""  # how its rows are named in data.train, where they are no file of rows
    rows_settings: tuple[str, ...] = ()  # that the studio shows with its rows, in place of columns
    described: tuple[str, ...] = ()  # endings of files that a text of the same name describes
    read_paths: tuple[str, ...] = ()  # settings that are paths, of what is read
    written_paths: tuple[str, ...] = ()  # and of what is written
    taken_as: tuple[str, ...] = ()  # ways in which the studio takes its results away (studio/taking.WAYS)
    rows_page: str = ""  # "module:function" (RunConfig, send) that shows its rows in the studio; empty: rows of text
    try_page: str = ""  # the studio's page that tries its runs; empty: that of texts, if it has a text model
    conflicts: Callable[[Any], list[str]] = _no_conflicts  # RunConfig → a message for each conflict of settings
    verbs: tuple[AddedVerb, ...] = ()
    require_rows: str = ""  # "module:function" (RunConfig, whole=bool) that raises DataError for missing rows, without torch
    require_model: str = ""  # the same (RunConfig) for a missing model
    shapes: Mapping[str, str] = field(default_factory=dict)  # "module:name" of a data.shapes.AddedShape, by its data.format
    metrics: Mapping[str, Any] = field(default_factory=dict)  # name → evaluate.wording.MetricWords of what only it measures
    rivals: Mapping[str, str] = field(default_factory=dict)  # what its adapter is compared with, as a headline names it
    row_unit: str = " nats"  # of a row's loss in its report
    trials: str = ""  # "module:class" of the trials with which lorakeet tune searches its settings; empty: it cannot
    package: str = "lorakeet"  # that registered it; known when it was found


def function_at(place: str) -> Any:
    """The function that "module:function" names; for an empty text one that does nothing."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name) if module else _no_conflicts


@cache
def declarations() -> Mapping[str, KindDeclaration]:
    """Every kind by its name. Raises EnvironmentProblem for an entry point that cannot be imported, ConfigError for two of one
    name."""
    found = {}
    for name, module in OWN.items():
        found[name] = import_module(module).DECLARATION
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.value
        if point.name in found:
            both = [found[point.name].package, package]
            said = f"Two packages register the kind of run {point.name!r}: {' and '.join(both)}. Uninstall one."
            raise ConfigError(said, code="kinds-collide", values={"kind": point.name, "packages": both})
        who, mend = f"The kind of run {point.name!r} of the package {package}", f"Mend or uninstall it: pip uninstall {package}"
        try:
            one = point.load().DECLARATION
        except Exception as error:
            raise EnvironmentProblem(f"{who} cannot be imported: {type(error).__name__}: {error}. {mend}") from error
        if why := _why_not(one, point.name, found):
            raise EnvironmentProblem(f"{who} cannot be used: {why}. {mend}")
        found[point.name] = replace(one, package=package)
    return found


def _why_not(one: Any, name: str, known: Mapping[str, KindDeclaration]) -> str:
    """Why a declaration of another package cannot be used; empty if it can."""
    if not isinstance(one, KindDeclaration):
        return f"its DECLARATION is {type(one).__name__}, not KindDeclaration"
    if one.name != name:
        return f"its DECLARATION is called {one.name!r}"
    taken = {*_TAKEN, *(section for other in known.values() for section in other.sections)}
    wrong = [section for section in one.sections if section in taken or not section.isidentifier()]
    return f"its sections {', '.join(wrong)} have names that are taken, or are no names" if wrong else ""


def own_kinds() -> tuple[str, ...]:
    """The names that `kind` in a run file may have."""
    return tuple(name for name, one in declarations().items() if not one.over)


def objectives() -> Mapping[str, Objective]:
    """What train.objective may be, by name; the first is its default."""
    return {one.name: one for declaration in declarations().values() for one in declaration.objectives}


def first_objective() -> Objective:
    """The default of train.objective."""
    return next(iter(objectives().values()))


def shape_names() -> tuple[str, ...]:
    """What kinds add to data.format."""
    return tuple(name for one in declarations().values() for name in one.shapes)


def train_settings() -> type[TrainedObjective]:
    """A dataclass of train.objective and of the settings that kinds add to `train`."""
    known = declarations().values()
    words = f"What is trained: {', '.join(one.trains for one in known if one.trains)}."
    names = "Literal[tuple(objectives())]"  # evaluated at each reading: of every kind
    chosen = ("objective", names, setting(first_objective().name, words))
    about: dict[str, Any] = {"frozen": True, "namespace": {"__module__": __name__}}
    first = make_dataclass("ChosenObjective", [chosen], bases=(TrainedObjective,), **about)
    added = [one.train for one in known if one.train is not None]
    return make_dataclass("AddedSettings", [], bases=(*reversed(added), first), **about)


def text_sections() -> dict[str, type[Any]]:
    """The sections of the run file that kinds with a text model bring."""
    return {name: one.spec for each in declarations().values() if each.text_model for name, one in each.sections.items()}


def declared(kind: str, objective: str = "") -> KindDeclaration:
    """The declaration of `kind`, or of the kind over it that has this objective. Raises ConfigError for an unknown name."""
    known = declarations()
    if kind not in known:
        listed = ", ".join(f"{name} (of {known[name].package})" for name in own_kinds())
        said = f"There is no kind of run {kind!r}; there are {listed}.{nearest(kind, known)}"
        raise ConfigError(said, code="kind-unknown", values={"kind": kind, "known": list(own_kinds())})
    over = [one for one in known.values() if one.over == kind and objective in [each.name for each in one.objectives]]
    return over[0] if over else known[kind]
