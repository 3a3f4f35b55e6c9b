"""What pages may read while a form changes: only what lies on this machine, ready to be read. Nothing is fetched or unpacked."""

from __future__ import annotations

from pathlib import Path

from lorakeet.config import RunConfig
from lorakeet.data.read import is_hub_id
from lorakeet.data.spec import DataSpec
from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text
from lorakeet.models.files.source import bytes_to_unpack, on_this_machine


def unready_model(config: RunConfig) -> str:
    """Why the model's files cannot be read without fetching or unpacking them; empty if they can."""
    path = config.model.path
    if on_this_machine(config.model) is None:
        return f"model.path '{path}' is not on this machine, and nothing is fetched here. The command below fetches it."
    if size := bytes_to_unpack(config.model):
        return f"model.path '{path}' is to be unpacked first, which takes {bytes_text(size)}. The command below does that once."
    return ""


def fetched_rows(data: DataSpec) -> list[str]:
    """The names of rows that would be loaded from the hub."""
    named = (data.train, data.held_out, data.test)
    return [name for name in named if name and not Path(name).expanduser().exists() and is_hub_id(name)]


def require_local_rows(data: DataSpec) -> None:
    """Raises EnvironmentProblem for rows that would be loaded from the hub."""
    if found := fetched_rows(data):
        raise EnvironmentProblem(
            f"'{found[0]}' is a data set of the hub, and nothing is fetched here. Download it into a folder of the studio, "
            "or start the run, which loads it."
        )
