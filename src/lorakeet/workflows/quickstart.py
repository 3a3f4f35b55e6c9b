"""`lorakeet quickstart`: `lorakeet finetune` on the run file that is shipped with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from lorakeet.errors import EnvironmentProblem

__all__ = ["config_path"]


def config_path() -> Path:
    """The path of examples/drug_reviews.yaml, in the checkout or in the installed package."""
    checkout = Path(__file__).parents[3] / "examples" / "drug_reviews.yaml"
    if checkout.is_file():
        return checkout
    with as_file(files("lorakeet") / "examples" / "drug_reviews.yaml") as shipped:
        if shipped.is_file():
            return shipped
    raise EnvironmentProblem("The shipped run file drug_reviews.yaml is missing; install Lorakeet again: pip install lorakeet.")
