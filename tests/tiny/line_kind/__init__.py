"""What the package `line_kind` declares of its kind of run, without torch; its entry point `lorakeet.kinds` names this module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.registry import AddedVerb, KindDeclaration, Section
from lorakeet.setting import setting


@dataclass(frozen=True)
class LineSpec:
    """The part `line` of a run file."""

    start: float = setting(0.0, "Both weights before training.")


@dataclass(frozen=True)
class DrawLineOptions:
    """Options of the verb that this kind brings."""

    run: str = setting("", "The run whose line is printed.")


def require_line(options: DrawLineOptions) -> None:
    if not options.run:
        raise ConfigError("No run is given; name one with --run.")


def _conflicts(config: Any) -> list[str]:
    asked = config.kind == "line" and config.model.quantize.method != "none"
    return ["model.quantize is set, but a line has no layers to quantise. Leave it out."] if asked else []


DECLARATION = KindDeclaration(
    name="line", help="a line through numbers", module="line_kind.kind",
    sections={"line": Section(LineSpec, "The line, for kind line.")},
    verbs=(AddedVerb("draw-line", "Print a line.", DrawLineOptions, "line_kind.kind:draw_line", "line_kind:require_line"),),
    lacks={"seeds": "A line has one solution. Leave --seeds out."}, conflicts=_conflicts,
)  # fmt: skip
