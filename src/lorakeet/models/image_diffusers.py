"""The package diffusers: imported where an image model is needed, quiet, and asked for a denoiser by its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorakeet.errors import EnvironmentProblem
from lorakeet.models.quiet import quiet_transformers


def diffusers() -> Any:
    """The package diffusers. EnvironmentProblem where it is not installed."""
    with quiet_transformers():
        try:
            import diffusers as package
        except ImportError as error:
            raise EnvironmentProblem(
                f"Image models need diffusers, which is not installed ({error}). Install it: pip install 'lorakeet[images]'"
            ) from error
    return package


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silences what transformers and diffusers say besides errors; afterwards their settings are as they were."""
    logging = diffusers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def new_denoiser(config: Mapping[str, Any]) -> Any:
    """The denoiser that the content of its config.json describes, on the current default device, its weights random."""
    return getattr(diffusers(), config["_class_name"]).from_config(dict(config))
