"""Imports the package diffusers when an image model is needed, silences it, and builds a denoiser from its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorakeet.errors import DataError, PackageMissing
from lorakeet.models.files.quiet import errors_only, quiet_transformers


def diffusers() -> Any:
    """Returns the package diffusers; EnvironmentProblem if it is not installed."""
    with quiet_transformers():
        try:
            import diffusers as package
        except ImportError as error:
            raise PackageMissing(f"Image models need diffusers, which is not installed ({error})", "lorakeet[images]") from error
    return package


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """A context in which transformers and diffusers report errors only; their settings are restored afterwards."""
    with errors_only(diffusers().utils.logging), quiet_transformers():
        yield


def new_denoiser(config: Mapping[str, Any]) -> Any:
    """The part that the content of its config.json describes, on the current default device, its weights random.

    DataError where that names no class of diffusers.
    """
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    owner = getattr(diffusers().models, name, None) if isinstance(name, str) else None
    if not (isinstance(owner, type) and hasattr(owner, "from_config")):
        held = f"has the _class_name {name!r}" if isinstance(config, Mapping) else f"is a {type(config).__name__}"
        raise DataError(
            f"The configuration of a UNet or transformer {held}; expected an object with the name of a model class of diffusers, "
            "such as UNet2DConditionModel. Fetch its config.json again, or save the pipeline anew with save_pretrained."
        )
    return owner.from_config(dict(config))
