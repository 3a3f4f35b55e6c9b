"""The types of what `lorakeet.__all__` offers."""

from lorakeet.api.adapter import AdapterValue as Adapter
from lorakeet.api.adapter import combine as combine
from lorakeet.api.artefacts import evaluate as evaluate
from lorakeet.api.artefacts import export as export
from lorakeet.api.artefacts import merge as merge
from lorakeet.api.artefacts import predict as predict
from lorakeet.api.artefacts import verify as verify
from lorakeet.api.attach import activate as activate
from lorakeet.api.attach import adapter_of as adapter_of
from lorakeet.api.attach import attach as attach
from lorakeet.api.attach import detach as detach
from lorakeet.api.attach import parameters as parameters
from lorakeet.api.model import BaseModelHandle as Model
from lorakeet.api.model import load as load
from lorakeet.api.peft_bridge import from_peft as from_peft
from lorakeet.api.peft_bridge import to_peft as to_peft
from lorakeet.api.rows import rows as rows
from lorakeet.api.run import FinishedRun as Run
from lorakeet.api.run import finetune as finetune
from lorakeet.api.run import open_run as open_run
from lorakeet.api.run import resume as resume
from lorakeet.config import RunConfig as RunConfig
from lorakeet.config import read_run as read_run
from lorakeet.core.spec import LoraSpec as Lora
from lorakeet.data.spec import DataSpec as Data
from lorakeet.errors import LorakeetError as LorakeetError
from lorakeet.evaluate.certificate import read_certificate as read_certificate
from lorakeet.evaluate.report.report import read_report as read_report
from lorakeet.evaluate.spec import EvaluateSpec as Evaluate
from lorakeet.formats.detect import read_adapter as read_adapter
from lorakeet.kinds.preference.spec import PreferenceSpec as Preference
from lorakeet.memory.spec import MemorySpec as Memory
from lorakeet.ranks.spec import RanksSpec as Ranks
from lorakeet.train.spec import TrainSpec as Train

__all__ = [
    "Adapter",
    "Data",
    "Evaluate",
    "Lora",
    "LorakeetError",
    "Memory",
    "Model",
    "Preference",
    "Ranks",
    "Run",
    "RunConfig",
    "Train",
    "__version__",
    "activate",
    "adapter_of",
    "attach",
    "combine",
    "detach",
    "evaluate",
    "export",
    "finetune",
    "from_peft",
    "load",
    "merge",
    "open_run",
    "parameters",
    "predict",
    "read_adapter",
    "read_certificate",
    "read_report",
    "read_run",
    "resume",
    "rows",
    "to_peft",
    "verify",
]
__version__: str
