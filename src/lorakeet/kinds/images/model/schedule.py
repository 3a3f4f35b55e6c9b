"""The scheduler of an image model: defaults of its class, check against the model, and override of its prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.kinds.images.model.diffusers_import import diffusers
from lorakeet.kinds.images.model.kinds import ImageKind

PREDICTIONS = ("epsilon", "v_prediction")  # of models without a flow


def with_defaults(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a scheduler's configuration with the defaults of its class, betas included, as a pipeline has it.

    Unchanged if diffusers does not know the class.
    """
    made = getattr(diffusers(), str(scheduler.get("_class_name")), None)
    settings = {} if made is None else inspect.signature(made.__init__).parameters
    known = {name: one.default for name, one in settings.items() if one.default is not inspect.Parameter.empty}
    return {**known, **scheduler}


def scheduler_for(scheduler: Any, kind: ImageKind, prediction: str, name: str, say: Callable[[str], None]) -> Any:
    """Returns diffusers' `scheduler` of the model `name`, rebuilt if its prediction is not `prediction`; auto keeps it.

    So a checkpoint with a wrong configuration is trained, evaluated and sampled correctly. Raises ConfigError if the scheduler
    or the prediction does not fit this kind of model.
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
    configured = str(scheduler.config.prediction_type)
    wanted = configured if prediction == "auto" else prediction
    if wanted not in PREDICTIONS:
        raise ConfigError(
            f"{name} predicts '{wanted}'; expected {' or '.join(PREDICTIONS)}. If its scheduler's configuration is wrong, set "
            "diffusion.prediction (generate: --prediction)."
        )
    if wanted == configured:
        return scheduler
    say(f"{name} is used as predicting {wanted}, though its scheduler says {configured}.")
    return type(scheduler).from_config(scheduler.config, prediction_type=wanted)
