"""`verification.artefact`: each form is opened as what it is and answers like the live model; templates cannot reach out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.errors import ConfigError
from lorakeet.exporting.llama_cpp import LlamaCpp
from lorakeet.exporting.tolerances import BF16, F32, Q4
from lorakeet.memory.budget import Budget
from lorakeet.memory.mapped_files import releasing_pages
from lorakeet.merging.merged_folder import merge_into
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.runs.residency import Residency
from lorakeet.verification import artefact as artefacts
from lorakeet.verification.artefact import (
    InLlamaCpp,
    InTorch,
    artefact_name,
    is_there,
    live_side,
    open_artefact,
    render_template,
)
from tiny.dense import fold_into
from tiny.exports import write_lora, write_model
from tiny.runs import quiet

TALK = [{"role": "user", "content": "Is it 12:30?"}]
IDS = [5, 9, 70, 33, 12, 40]


def test_every_form_answers_like_the_live_model(finished: Any, tmp_path: Path) -> None:
    opened = open_adapter(finished.path)
    live = live_side(opened, quiet())
    write_model(finished.model, opened.adapter, tmp_path / "model.gguf")
    merge_into(finished.model, opened.adapter, tmp_path / "merged", dtype="bfloat16")
    folder = tmp_path / "ollama"
    folder.mkdir()
    write_model(finished.model, None, folder / "model.gguf")
    write_lora(finished.model, opened.adapter, folder / "adapter.gguf")
    for target, kind, allowed, limit in (
        ("model.gguf", InLlamaCpp, F32, 1e-4),
        ("merged", InTorch, BF16, 0.5),
        ("ollama", InLlamaCpp, F32, 1e-4),
    ):
        asked = {"base": None, "precision": "auto", "console": quiet(), "context": 128}
        with open_artefact(str(tmp_path / target), opened, **asked) as artefact:  # type: ignore[arg-type]
            assert isinstance(artefact, kind) and artefact.allowed is allowed
            torch.testing.assert_close(artefact.logits(IDS), live.logits(IDS), atol=limit, rtol=0)
            assert artefact.prompt(TALK) == live.prompt(TALK) and artefact.tokenise("a 1") == live.tokenise("a 1")
            assert len(artefact.greedy(IDS, 3, frozenset())) in (1, 2, 3)
            assert all(found.rounding < 0.01 for found in artefact.stored(finished.model, opened).values())
    with open_artefact(
        str(tmp_path / "model.gguf"), opened, base=None, precision="4-bit", console=quiet(), context=64
    ) as artefact:
        assert artefact.allowed is Q4


def test_llama_cpp_starts_on_the_first_request_and_under_a_budget_gives_pages_back(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_adapter(finished.path)
    write_model(finished.model, opened.adapter, tmp_path / "model.gguf")
    begun: list[Path] = []
    given: list[tuple[Path, bool, int]] = []

    class Counted(LlamaCpp):
        def __init__(self, model: Path, **more: Any) -> None:
            begun.append(model)
            super().__init__(model, **more)

    @contextmanager
    def noted(path: Path, *, interval: float = 0.001, stays: bool = False) -> Iterator[None]:
        given.append((path, stays, len(begun)))
        with releasing_pages(path, interval=interval, stays=stays):
            yield

    monkeypatch.setattr(artefacts, "LlamaCpp", Counted)
    monkeypatch.setattr(artefacts, "releasing_pages", noted)
    found = []
    for budget in (None, "1TiB"):
        residency: Residency[Any] = Residency(Budget.parse(budget))
        asked = {"base": None, "precision": "auto", "console": quiet(), "context": 64}
        with open_artefact(str(tmp_path / "model.gguf"), replace(opened, residency=residency), **asked) as artefact:  # type: ignore[arg-type]
            before = len(begun)
            assert artefact.stored(finished.model, opened) and len(begun) == before
            found.append(artefact.logits(IDS))
            assert len(begun) == before + 1
    file = tmp_path / "model.gguf"
    assert given == [(file, False, 1), (file, True, 2)], "while it begins, when its mapping may go, and while it computes"
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_logits_of_the_live_model_are_its_own(finished: Any) -> None:
    live = live_side(open_adapter(finished.path), quiet())
    found = live.logits(IDS)
    model = fold_into(transformers.AutoModelForCausalLM.from_pretrained(finished.model), open_adapter(finished.path).adapter)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0]
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_a_template_in_a_file_is_rendered_and_cannot_reach_out() -> None:
    assert render_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", TALK, bos="<s>", eos="</s>") == (
        "<s>Is it 12:30?</s>"
    )
    for template in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}", "{% if %}"):
        with pytest.raises(ConfigError, match="cannot be rendered"):
            render_template(template, TALK, bos="", eos="")


def test_names_tell_files_apart_and_lead_back_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, away = tmp_path / "runs", tmp_path / "away"
    for folder in (runs / "a", away):
        folder.mkdir(parents=True)
        (folder / "model.gguf").touch()
    names = [artefact_name(folder / "model.gguf", runs) for folder in (runs / "a", away)]
    assert names == ["a/model.gguf", (away / "model.gguf").as_posix()]
    monkeypatch.chdir(away)
    assert artefact_name(Path("../runs/a/model.gguf"), runs) == names[0]
    assert artefact_name(Path("model.gguf"), None) == "model.gguf"
    assert all(is_there(name, runs) for name in (*names, " + ".join(names), "http://127.0.0.1:1#x", "a/"))
    (away / "model.gguf").unlink()
    assert not is_there(names[1], runs) and not is_there(" + ".join(names), runs)
