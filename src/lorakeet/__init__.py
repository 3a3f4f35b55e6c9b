"""Lorakeet: from a pre-trained model to a verified LoRA adapter, on the hardware at hand.

The names in `__all__` are for scripts and notebooks, and are imported at first use. The verbs are functions
as well: `from lorakeet.workflows.finetune import finetune`, and so on.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["LorakeetError", "RunConfig", "__version__", "read_adapter", "read_certificate", "read_report", "read_run"]

_PLACES = {
    "LorakeetError": "lorakeet.errors",
    "RunConfig": "lorakeet.config",
    "read_adapter": "lorakeet.formats.detect",
    "read_certificate": "lorakeet.evaluate.certificate",
    "read_report": "lorakeet.evaluate.report.report",
    "read_run": "lorakeet.config",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lorakeet' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PLACES[name]), name)
