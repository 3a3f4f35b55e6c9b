"""The model card (README.md) of an export or an adapter: what it is, how to use it, and what the run measured.

Model hubs read the front matter: base model, licence, data sets, tags. Only known facts are stated. Whatever a label, a template
or a name holds is shown as it is: nothing of it is read as Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lorakeet.data.locate import PACKAGE, locate_model
from lorakeet.errors import LorakeetError, visible
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.wording import MetricWords, all_metric_words, metric_words
from lorakeet.exporting.gguf_model import GgufModel
from lorakeet.exporting.ollama import ADAPTER, MODELFILE
from lorakeet.models.files.origin import base_form, readme_metadata
from lorakeet.models.spec import ModelSpec

_HUB = "hub:"
# What Markdown reads as more than text: signs of emphasis, code, links, HTML and tables; and at the beginning, of blocks.
_SIGNS = re.compile(r"[\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w)|\A(?:[#+=-]|\d+(?=[.)]))")


@dataclass(frozen=True)
class CardFacts:
    """Facts for the README besides the run's report; empty fields are left out."""

    title: str
    base_model: str
    files: Mapping[str, str]  # name → what it is
    usage: Sequence[str]  # commands
    library: str = ""
    licence: str = ""
    datasets: Sequence[str] = ()
    notes: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    relation: str = "finetune"  # to the base model, as model hubs call it
    task: str = "text-generation"  # as model hubs call it
    base_form: str = ""  # how the base was stored and packed while the adapter was trained


def card_of_export(
    model: GgufModel, out: Path, name: str, *, source: Path, base: ModelSpec, rows: str | None,
    said: tuple[Report | None, Certificate | None],
) -> str:  # fmt: skip
    """The model card of `out`, a GGUF file or a folder for Ollama; `rows` are those of the training, None without a run."""
    files = {model.path.name: f"the model, {model.bytes:,} bytes (tensors: {model.words})"}
    usage = [f"llama-server -m {out.name}"]
    if out.is_dir():
        files |= {MODELFILE: "the instructions for Ollama"}
        if (out / ADAPTER).exists():
            files[ADAPTER] = "the adapter, applied to the model as it runs"
        usage = ["cd FOLDER", f"ollama create {name} -f {MODELFILE}", f"ollama run {name}"]
    settings = {} if rows is None else {"Learning rows": Path(rows).name or "not known"}
    facts = CardFacts(
        title=name, base_model=base.path, files=files, usage=usage, library="gguf", licence=licence_of(source),
        datasets=(rows or "",), notes=model.notes, settings=settings, base_form=base_form(base),
    )  # fmt: skip
    return card(facts, *said)


def card(facts: CardFacts, report: Report | None, certificate: Certificate | None) -> str:
    """The text of the README.md."""
    parts = [_front(facts, report), f"# {_text(facts.title)}", ""]
    base, path = facts.base_model, Path(facts.base_model)
    if not base.startswith(PACKAGE) and not _is_hub_id(base):
        base = path.name

    def text(given: str) -> str:
        return _text(given.replace(facts.base_model, base) if path.is_absolute() else given)

    form = f" ({text(facts.base_form)})" if facts.base_form else ""
    parts.append(f"A LoRA adapter trained on {_code(base)}{form} with [Lorakeet](https://pypi.org/project/lorakeet/).")
    if report is not None and report.verdict is not None:
        parts += ["", f"**{text(report.verdict.sentence)}**"]
    parts += ["", "## Files", "", *(f"- {_code(name)}: {text(what)}" for name, what in facts.files.items())]
    usage = [_line(command) for command in facts.usage]
    fence = _fence("\n".join(usage), least=3)
    parts += ["", "## Use", "", fence, *usage, fence]
    if report is not None and report.systems:
        parts += ["", "## How good it is", "", *_results(report)]
    settings = {**facts.settings, **(report.facts if report is not None else {})}
    settings.pop("Run folder", None)
    if settings:
        parts += ["", "## How it was made", "", "| | |", "| --- | --- |"]
        parts += [f"| {_text(name)} | {text(value)} |" for name, value in settings.items()]
    if certificate is not None:
        good = "All checks passed" if certificate.verdict == "Passed" else text(certificate.verdict)
        verdict = good if certificate.passed else "**Not all checks passed: do not use it**"
        parts += ["", "## Is it the model that was trained?", "", f"{verdict}.", ""]
        parts += [f"- {text(str(found))}" for found in (*certificate.checks, *certificate.modules, *certificate.unchecked)]
    said = [*facts.notes, *(report.warnings if report is not None else ())]
    if certificate is not None and "adapter" in certificate.facts:
        said.append(f"The adapter was {certificate.facts['adapter']}.")
    if not facts.licence:
        said.append("The base model's folder does not say its licence; look it up before you pass this on.")
    parts += ["", "## What to know", "", *(f"- {text(note)}" for note in said)]
    return "\n".join(parts) + "\n"


def _front(facts: CardFacts, report: Report | None) -> str:
    front: dict[str, Any] = {}
    if _is_hub_id(facts.base_model):
        front |= {"base_model": facts.base_model, "base_model_relation": facts.relation}
    if facts.library:
        front["library_name"] = facts.library
    if facts.licence:
        front["license"] = facts.licence
    names = [name[len(_HUB) :].partition("#")[0] for name in facts.datasets if name.startswith(_HUB)]
    if names:
        front["datasets"] = names
    if report is not None and (measured := _measured(report)):
        front["metrics"] = measured
    front |= {"pipeline_tag": facts.task, "tags": ["lora", "lorakeet"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def _is_hub_id(name: str) -> bool:
    """True if no folder, file or package of this machine is meant."""
    try:
        return locate_model(name) is None
    except LorakeetError:
        return False


def _measured(report: Report) -> list[str]:
    """The metrics of any system, in the order of a report."""
    return [name for name in all_metric_words() if any(name in system.metrics for system in report.systems)]


def _results(report: Report) -> list[str]:
    """The table of systems with their intervals, and the paired differences."""
    names = _measured(report)
    titles = " | ".join(metric_words(name).title for name in names)
    lines = [f"| system | {titles} | n |", "| --- |" + " --- |" * (len(names) + 1)]
    for system in report.systems:
        cells = [_estimate(system.metrics.get(name), metric_words(name)) for name in names]
        n = next((str(found.n) for found in system.metrics.values()), "")
        lines.append(f"| {_text(system.name)} | " + " | ".join(cells) + f" | {n} |")
    lines += [""] if report.comparisons else []
    for item in report.comparisons:
        found, words = item.difference, metric_words(item.metric)
        lines.append(
            f"- {_text(item.left)} − {_text(item.right)}, {words.inline}: {words.change(found.value)} "
            f"[{words.ends(found, signs=True, between=', ')}], {item.verdict} (p {item.p_value:.2g}, {item.test}, n = {found.n})"
        )
    lines += ["", "Square brackets are 95 % intervals on rows that training never saw."] if report.systems else []
    return lines


def _estimate(found: Estimate | None, words: MetricWords) -> str:
    return "" if found is None else f"{words.level(found.value)} [{words.ends(found, between=', ')}]"


def licence_of(folder: Path) -> str:
    """The licence in the front matter of a model folder's README.md; empty if there is none."""
    found = readme_metadata(folder).get("license")
    return found if isinstance(found, str) else ""


def _line(text: str) -> str:
    """The text on one line, its control characters as escapes."""
    return visible(" ".join(text.splitlines()).strip())


def _text(text: str) -> str:
    """The text for any place but a code block, as text alone."""
    return _SIGNS.sub(lambda sign: f"\\{sign[0]}" if not sign[0].isdigit() else f"{sign[0]}\\", _line(text))


def _code(text: str) -> str:
    """The text as a code span."""
    text = _line(text)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{_fence(text)}{pad}{text}{pad}{_fence(text)}"


def _fence(text: str, least: int = 1) -> str:
    """Backticks, more than `text` has at any place."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
