"""The scheduler of an image model: what its file leaves out, whether it goes with the model, and another prediction's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.models.image.diffusers_import import diffusers
from lorakeet.models.image.kinds import ImageKind

PREDICTIONS = ("epsilon", "v_prediction")  # of models that predict no flow


def with_defaults(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration with what its file leaves out, as the class that it names has it: betas too, but not EDM's.

    So it is what a pipeline has; nothing is built. As it stands where diffusers does not know the class.
    """
    made = getattr(diffusers(), str(scheduler.get("_class_name")), None)
    settings = {} if made is None else inspect.signature(made.__init__).parameters
    known = {name: one.default for name, one in settings.items() if one.default is not inspect.Parameter.empty}
    return {**known, **scheduler}


def scheduler_for(scheduler: Any, kind: ImageKind, prediction: str, name: str, say: Callable[[str], None]) -> Any:
    """diffusers' `scheduler` of the model `name`, rebuilt where it does not say `prediction`; auto takes its word.

    So a checkpoint whose configuration is wrong is trained, judged and drawn with by what it predicts. ConfigError where the
    scheduler or the prediction is none for this kind of model.
    """
    if kind.flow:
        if prediction not in ("auto", "flow"):
            raise ConfigError(f"diffusion.prediction is {prediction}, but {name} ({kind.pipeline}) predicts a flow; use auto.")
        return scheduler
    if prediction == "flow":
        raise ConfigError(f"diffusion.prediction is flow, but {name} ({kind.pipeline}) predicts no flow; use auto.")
    if "prediction_type" not in scheduler.config:
        raise ConfigError(
            f"{name} is a {kind.pipeline} with a {type(scheduler).__name__}, which is for models that predict a flow. Put the "
            "scheduler that the model was trained with, such as EulerDiscreteScheduler, into its model_index.json and "
            "scheduler/scheduler_config.json."
        )
    said = str(scheduler.config.prediction_type)
    wanted = said if prediction == "auto" else prediction
    if wanted not in PREDICTIONS:
        raise ConfigError(
            f"{name} predicts '{wanted}'; expected {' or '.join(PREDICTIONS)}. If its scheduler's configuration is wrong, say "
            "which with diffusion.prediction (generate: --prediction)."
        )
    if wanted == said:
        return scheduler
    say(f"{name} is taken to predict {wanted}, though its scheduler says {said}.")
    return type(scheduler).from_config(scheduler.config, prediction_type=wanted)
