"""The types of what `lorakeet.__all__` offers."""

from lorakeet.config import RunConfig as RunConfig
from lorakeet.config import read_run as read_run
from lorakeet.errors import LorakeetError as LorakeetError
from lorakeet.evaluate.certificate import read_certificate as read_certificate
from lorakeet.evaluate.report.report import read_report as read_report
from lorakeet.formats.detect import read_adapter as read_adapter

__all__ = ["LorakeetError", "RunConfig", "__version__", "read_adapter", "read_certificate", "read_report", "read_run"]
__version__: str
