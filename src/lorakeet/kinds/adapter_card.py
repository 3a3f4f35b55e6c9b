"""The model card of RUN/adapter, which model hubs and people read: what a run measured, and how PEFT loads the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorakeet.data.locate import PACKAGE
from lorakeet.disk import write_whole
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.report import Report
from lorakeet.exporting.card import CardFacts, card, licence_of
from lorakeet.formats.files.json_object import read_object
from lorakeet.kinds.protocol import Assembly, run_kind
from lorakeet.models.files.origin import base_form

NAME = "README.md"
_CONFIG = "adapter_config.json"
_FILES = {
    _CONFIG: "ranks, scales and the base, as PEFT reads them",
    "adapter_model.safetensors": "the trained pairs",
    "tokenizer.json": "the tokenizer, with the tokens that were added",
}
_HASHES = {"train": "Training rows", "test": "Test rows"}  # parts of split.json, in words


def write_adapter_card(
    adapter: Path, report: Report, certificate: Certificate, *, setup: Assembly, split: Mapping[str, object]
) -> None:
    """Writes README.md into the folder `adapter` of a run.

    The licence is that of the base's folder, if it says one; `split` is the content of split.json. Raises OSError.
    """
    loaded = str(read_object(adapter / _CONFIG, expected="an adapter of PEFT").get("base_model_name_or_path"))
    loads, kind = not loaded.startswith(PACKAGE) and not loaded.lower().endswith(".gguf"), run_kind(setup.config)
    settings = {f"{what}, SHA-256": str(split[f"{part}_sha256"]) for part, what in _HASHES.items() if split.get(f"{part}_rows")}
    facts = CardFacts(
        title=f"Adapter of {Path(setup.name).name}", base_model=setup.name, usage=kind.usage(loads=loads), library="peft",
        files={name: what for name, what in _FILES.items() if (adapter / name).is_file()},
        licence="" if setup.base_folder is None else licence_of(setup.base_folder), datasets=(setup.config.data.train,),
        settings=settings, relation="adapter", task=kind.hub_task,
        base_form=base_form(setup.config.model),
    )  # fmt: skip
    write_whole(adapter / NAME, card(facts, report, certificate).encode())
