"""What is measured of a model with an adapter; as `lorakeet.evaluate(…)` it is the verb of the Python API."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CalledPackage(ModuleType):
    """A package that has the name of a verb of the Python API: Python puts it where the verb would be."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        return import_module("lorakeet.api.artefacts").evaluate(*given, **options)


sys.modules[__name__].__class__ = _CalledPackage
