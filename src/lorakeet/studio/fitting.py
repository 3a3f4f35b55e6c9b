"""What the screen Fit says of a run: its memory by kind against what there is, the way that fits, its time, and what would help.

Imports torch: it is carried out by the workbench alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rich.console import Console

from lorakeet.config import read_run
from lorakeet.data.spec import NO_ROWS
from lorakeet.evaluate.wording import bytes_text, duration_text
from lorakeet.kernels import bitsandbytes_nf4
from lorakeet.kernels.proof import missing_package
from lorakeet.kinds.protocol import Advice, PlanResult
from lorakeet.kinds.text.plan import TextPlanResult
from lorakeet.memory.beside import gpu_beside
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.memory.ledger import know_operators, known_operators
from lorakeet.memory.remembered import keep, recall
from lorakeet.models.files.quantized import plain_config
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.validate import auto_class_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import config_of, local_files, published_configs
from lorakeet.planning.forecast_text_run import CERTIFY, LOAD, SCORE
from lorakeet.planning.rehearse_text import BEGIN, CHECKPOINT, EVALUATE, FINAL, STEP
from lorakeet.studio.local import fetched_rows, unready_model
from lorakeet.studio.remedies import page_words
from lorakeet.studio.workbench import Send
from lorakeet.verbs.options import PlanOptions
from lorakeet.verbs.plan import plan

WORDS = {
    "base": "the model",
    "saved activations": "kept for the backward pass",
    "adapter": "the adapter",
    "moments": "the optimiser",
    "gradients": "gradients",
    "logits": "predictions",
    "scratch": "needed for a moment",
    "runtime": "Python and its libraries",
    "allocator": "left over by the allocator",
}  # in the order of a bar
ON_GPU = {**WORDS, "runtime": "CUDA and its libraries"}
OPERATORS = "operators on shapes"
_WIDTH = 110


def import_packages() -> None:
    """Imports the package that unpacks NF4 on a GPU, where it is installed: each plan of an NF4 model would else import it.

    Not beside a GPU: it asks that for its compute capability, which starts CUDA, and no process forked later could use it.
    """
    if not gpu_beside() and not missing_package(bitsandbytes_nf4.PACKAGE, bitsandbytes_nf4.VERSIONS):
        with quiet_transformers():
            import_module(bitsandbytes_nf4.PACKAGE)


def import_published_code() -> None:
    """Imports transformers' code of the models whose configurations are shipped, which most others share."""
    for path in published_configs():
        import_code({"model.path": path})


def keep_configuration(settings: Mapping[str, str]) -> None:
    """Reads the configuration of a .gguf model, which takes seconds and is kept, so that each later plan begins with it."""
    local = local_files(settings.get("model.path", ""))
    if local is not None and local.suffix == ".gguf":
        with quiet_transformers():
            config_of(ModelSpec(path=settings["model.path"]), lambda line: None)


def import_code(settings: Mapping[str, str]) -> None:
    """Imports transformers' code of a model whose configuration is here, which each plan needs."""
    path = settings.get("model.path", "")
    local = local_files(path)
    if local is not None or path in published_configs():
        with quiet_transformers():
            config = plain_config(config_of(ModelSpec(path=path), lambda line: None))
            auto_class_of(config)._model_mapping[type(config)]


_PHASES = {
    LOAD: "while the model is read",
    "unpack": "while the model is unpacked",
    BEGIN: "while the adapter is made",
    SCORE: "while ranks are measured",
    EVALUATE: "while held-out rows are measured",
    STEP: "in a step of the training",
    CHECKPOINT: "while a checkpoint is written",
    FINAL: "while the result is measured",
    CERTIFY: "while the result is proved",
}  # as a page says it
AT_START = (import_packages, import_published_code)  # called by the workbench once, when this module is imported
BEFORE = (keep_configuration, import_code)  # called by the workbench before it forks


def fit(settings: Mapping[str, str], send: Send) -> None:
    """Plans the run of `settings` on settings["machine"], or within memory.budget; sends a part for each that is known more of.

    The first part is the run with all of its weights in memory; the last one has also the way that fits, or what would help.
    Raises what `lorakeet plan` raises.
    """
    given = {name: text for name, text in settings.items() if name != "machine"}
    config = read_run(None, {"data.train": NO_ROWS, **given})
    machine: Any = None if config.memory.limit else settings.get("machine") or "this"
    said = io.StringIO()
    with_rows = config.declaration.text_model and config.data.train != NO_ROWS
    if with_rows and (why := unready_model(config) or ", ".join(fetched_rows(config.data))):
        said.write(f"Planned for rows of data.max_tokens, without reading your rows: {why}\n")
        config = config.changed(data={"train": NO_ROWS})
    elif with_rows:
        send({"say": "Reads the rows, and searches them for copies as the run will"})
    console = Console(file=said, width=_WIDTH, color_system=None, soft_wrap=True)

    def first_answer(first: PlanResult) -> None:
        send({"part": fit_values(first, searching=first.peak > first.bound.bytes)})
        pass_operators_on()

    know_operators(recall(OPERATORS) or {})
    with quiet_transformers():
        result = plan(config, PlanOptions(machine=machine), console=console, watch=first_answer)
    send({"part": {**fit_values(result), "printed": said.getvalue()}})
    pass_operators_on()


def pass_operators_on() -> None:
    """Passes what this process knows of operators on shapes to later plans, where it is more than they know."""
    found = known_operators()
    if len(found) > len(recall(OPERATORS) or {}):
        keep(OPERATORS, found)


def fit_values(result: PlanResult, *, searching: bool = False) -> dict[str, Any]:
    """One part: plain values for the page. Bytes and seconds are numbers; sentences are ready to be read."""
    words = ON_GPU if result.device.type == "cuda" else WORDS
    streamed = result.streamed if isinstance(result, TextPlanResult) else None
    bound, later = result.bound, result.later_commands
    whole = _run_peak(result.planned.forecast, later)
    shown = whole if streamed is None else _run_peak(streamed.choice.plan.forecast, later)
    state = "searching" if searching else "fits" if whole.bytes <= bound.bytes else "otherwise" if streamed else "too-large"
    helping = _helping(result)
    if state == "too-large" and any(one["fits"] for one in helping):
        state = "with-changes"
    return {
        "state": state,
        "sentence": _sentence(state, whole, shown, bound),
        "way": "" if streamed is None else f"{streamed.words[:1].upper()}{streamed.words[1:]}.",
        "limit": bound.limit,
        "limit_words": _limit_words(bound),
        "bar": bar_values(shown, words),
        "whole": bar_values(whole, words) if shown is not whole else None,
        "phases": [{"name": phase.name, "bytes": phase.bytes} for phase in result.planned.forecast.phases],
        "time": time_words(result),
        "helping": helping,
        "trained": f"{result.planned.plan.parameters:,} numbers are trained",
    }


def bar_values(phase: Phase, words: Mapping[str, str]) -> dict[str, Any]:
    """The kinds of memory at one phase's peak, in the order in which a bar shows them."""
    kinds = [
        {"kind": kind, "words": text, "bytes": phase.kinds[kind], "size": bytes_text(phase.kinds[kind])}
        for kind, text in words.items() if phase.kinds.get(kind)
    ]  # fmt: skip
    when = _PHASES.get(phase.name, f"in the phase {phase.name!r}")
    return {"phase": when, "bytes": phase.bytes, "size": bytes_text(phase.bytes), "kinds": kinds}


def time_words(result: PlanResult) -> str:
    """The time of a step and of training on this machine in a sentence; why not, where it is not estimated."""
    if not isinstance(result, TextPlanResult) or result.speed is None:
        what = "on a GPU" if result.device.type == "cuda" else f"of a run on {result.config.declaration.rows_called}"
        return f"The time {what} is not estimated; a run says it after its first steps."
    lengths, steps, seconds = result.lengths, result.steps, result.training_seconds
    if lengths is None or steps is None or seconds is None:
        step = result.micro_batches * result.seconds
        return f"A step of full rows takes at least {duration_text(step)} on this machine. Choose rows to see how long all takes."
    counted = f"{steps:,} steps" if lengths.exact else f"about {steps:,} steps (copies are not searched in so many rows)"
    return (
        f"A step takes about {duration_text(seconds / steps)} on this machine; training about {duration_text(seconds)}, "
        f"{counted}. Measuring before and after comes on top, often as long again."
    )


def _helping(result: PlanResult) -> list[dict[str, Any]]:
    """What would lower the peak, that which fits first."""

    def values(advice: Advice) -> dict[str, Any]:
        how = ", with blocks read from disk as they are needed" if advice.streamed else ""
        named = [page_words(f"{name} {value}") for name, value in advice.settings.items()]
        return {
            "settings": dict(advice.settings),
            "words": f"{', '.join(named)}{how}",
            "size": bytes_text(advice.peak),
            "fits": advice.peak <= result.bound.bytes,
        }

    return sorted(map(values, result.advice), key=lambda one: not one["fits"])


def _run_peak(forecast: Forecast, later: tuple[str, ...]) -> Phase:
    """The phase with the most bytes, of those that are part of the run."""
    return max((phase for phase in forecast.phases if phase.name not in later), key=lambda phase: phase.bytes)


def _limit_words(bound: Budget) -> str:
    return f"{bound} free on {bound.free}" if bound.free else f"budget of {bound}" if bound else ""


def _sentence(state: str, whole: Phase, shown: Phase, bound: Budget) -> str:
    limit = _limit_words(bound)
    of = f" of the {limit}" if bound else ""
    sentences = {
        "fits": f"It fits: {bytes_text(whole.bytes)}{of}.",
        "searching": f"With everything in memory it takes {bytes_text(whole.bytes)}, more than the {limit}. A way is searched …",
        "otherwise": f"It fits if it is computed in another way: {bytes_text(shown.bytes)}{of}.",
        "with-changes": f"It does not fit as it is: {bytes_text(whole.bytes)}{of}. One change is enough.",
        "too-large": f"It does not fit: {bytes_text(whole.bytes)}{of}.",
    }
    return sentences[state]
