"""`lorakeet quickstart`: `lorakeet finetune` on the run file that is shipped with the package, which fetches what that needs."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from lorakeet.config import RunConfig
from lorakeet.errors import EnvironmentProblem
from lorakeet.train.launch import launched
from lorakeet.verbs.options import QuickstartOptions
from lorakeet.verbs.packages import fetch_packages, missing_packages

if TYPE_CHECKING:
    from rich.console import Console

    from lorakeet.verbs.finetune import FinetuneResult

__all__ = ["config_path", "quickstart"]


def quickstart(config: RunConfig, options: QuickstartOptions, *, console: Console) -> FinetuneResult:
    """Fetches the packages that the run needs and that are not there, then fine-tunes; it asks first, unless `yes`.

    Without them it raises EnvironmentProblem for --dry-run, several processes, a refusal, no terminal without `yes`, and if pip
    fails.
    """
    missing = missing_packages(config)
    if missing:
        fetch_packages(missing, console, may=not options.dry_run and launched().count == 1, yes=options.yes)
    from lorakeet.verbs.finetune import finetune  # torch, which would be loaded before the question

    return finetune(config, options, console=console)


def config_path() -> Path:
    """The path of examples/drug_reviews.yaml, in the checkout or in the installed package."""
    checkout = Path(__file__).parents[3] / "examples" / "drug_reviews.yaml"
    if checkout.is_file():
        return checkout
    with as_file(files("lorakeet") / "examples" / "drug_reviews.yaml") as shipped:
        if shipped.is_file():
            return shipped
    raise EnvironmentProblem("The shipped run file drug_reviews.yaml is missing; install Lorakeet again: pip install lorakeet.")
