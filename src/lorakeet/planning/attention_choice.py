"""Plans a run with the first attention with which its model runs on shapes, as a model is loaded with the first that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from lorakeet.config import RunConfig
from lorakeet.errors import EnvironmentProblem
from lorakeet.models.text.row_masks import recurrent_kinds
from lorakeet.planning.rehearse_text import NotPlanned

Rest = ParamSpec("Rest")
Plan = TypeVar("Plan")
OTHERS = ("sdpa", "eager")  # tried after varlen, which auto begins with


def first_attention(config: RunConfig, model_config: Any) -> str:
    """model.attention, or the first one that auto may become: sdpa where rows of the model's recurrent layers are never packed,
    else auto, which begins with varlen.
    """
    given = config.model.attention
    return OTHERS[0] if given == "auto" and recurrent_kinds(model_config) else given


def with_any_attention(
    forecast: Callable[Concatenate[RunConfig, Any, Rest], Plan],
) -> Callable[Concatenate[RunConfig, Any, Rest], Plan]:
    """`forecast` of a run and the model's configuration, with each attention that model.attention auto may become, until one can
    be planned. Rows of a model with recurrent layers are never packed, so its auto begins with sdpa.

    Raises NotPlanned with the last reason, or the first one if a rehearsal took too long.
    """

    def first_that_runs(config: RunConfig, model_config: Any, /, *rest: Rest.args, **settings: Rest.kwargs) -> Plan:
        others = iter(OTHERS if config.model.attention == "auto" else ())
        if config.model.attention == "auto" != first_attention(config, model_config):
            config = config.changed(model={"attention": next(others)})
        while True:
            try:
                return forecast(config, model_config, *rest, **settings)
            except (EnvironmentProblem, NotPlanned) as error:
                last = isinstance(error, NotPlanned) and error.final
                other = None if last else next(others, None)
                if other is None and isinstance(error, NotPlanned):
                    raise
                if other is None:
                    raise NotPlanned(f"This model cannot be planned: {error}") from error
                config = config.changed(model={"attention": other})

    first_that_runs.__doc__ = forecast.__doc__
    return first_that_runs
