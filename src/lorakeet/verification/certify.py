"""The certificate of what an adapter became: every artefact and server against the live adapter, on the same probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from lorakeet.evaluate.certificate import Certificate, Check, ServedModules, Unchecked, read_certificate
from lorakeet.evaluate.report.report import read_report, write_report
from lorakeet.exporting.merged_tensors import StoredTensor
from lorakeet.exporting.tolerances import F16, FEW_BITS, PRECISIONS, Q8
from lorakeet.memory.free import free_memory
from lorakeet.models.files.source import find_source
from lorakeet.planning.check import GREEDY_TOKENS, MARGIN, SERVERS
from lorakeet.runs.open_adapter import NAME, Opened
from lorakeet.runs.output_paths import writing
from lorakeet.serve.probe import FACT, record
from lorakeet.train.checkpoint import Damaged, load_checkpoint
from lorakeet.train.checkpoint import found as found_checkpoints
from lorakeet.train.progress import Count, counted
from lorakeet.train.run import RunFolder
from lorakeet.verification.artefact import Artefact, InTorch, artefact_name, is_there, live_side, open_artefact
from lorakeet.verification.checks import ask_all, check_greedy, check_logits, check_prompts, check_stored
from lorakeet.verification.diagnose import cause_from_logits, cause_from_weights
from lorakeet.verification.label_answers import check_label_answers, weak_answers
from lorakeet.verification.modules import MINUTES
from lorakeet.verification.probes import Probes, probes_of
from lorakeet.verification.server import Earlier, Server, check_server

ROWS = 16  # held-out rows that are compared
_SECOND_MODEL = 2.0  # times its weights: while it is loaded, and with its logits
CAUSE_TOKENS = 128  # of a row, on which mistakes are tried
VERIFIED = "verified adapter"  # the fact of how it was compared with its certificate


@dataclass(frozen=True)
class HowCompared:
    """How artefacts are compared: on how many held-out rows, by which tolerances, and what only some of them need."""

    rows: int | None = None  # None: ROWS, and of a server as many more as its proof needs
    precision: str = "auto"  # a key of PRECISIONS; auto: as the artefact says
    base_gguf: Path | None = None  # of a GGUF adapter
    minutes: float = MINUTES  # of one processor, in which the modules of a server are tested; 0: not at all
    key: str = ""  # sent to servers


def certify_artefacts(
    opened: Opened, against: Sequence[str], how: HowCompared, console: Console, *, of: str, beside: Path | None = None
) -> Certificate:
    """Returns the checks of every artefact of `against` against the live adapter, each named by the artefact's path.

    `of` names the adapter.
    """
    dataset = opened.dataset if opened.run else None
    source = find_source(opened.config.model, console.print)
    live, say = live_side(opened, console), partial(console.print, markup=False, soft_wrap=True)
    probes = probes_of(opened, dataset, live, how.rows or ROWS)
    probes = probes if how.rows is None else replace(probes, pool=tuple)
    longest = max((len(ids) for ids in (*probes.rows, *probes.prompts)), default=0)
    checks: list[Check] = []
    unchecked: list[Unchecked] = []
    modules: list[ServedModules] = []
    incomplete: dict[str, str] = {}
    for target in against:
        shown = target if target.startswith(SERVERS) else artefact_name(Path(target), beside)
        say(f"Comparing {shown} with the live adapter.")
        if target.startswith(SERVERS):
            server = Server(target, F16, how.key)
            computed = (server.said_precision() if how.precision == "auto" else "") or how.precision
            server.allowed = F16 if computed == "auto" else PRECISIONS[computed]
            formats = _formats(opened, live, computed, console)
            spec, earlier = opened.config.evaluate, _earlier(opened)
            served = check_server(live, server, probes, spec, formats, minutes=how.minutes, earlier=earlier, say=say)
            checks, unchecked, modules = checks + served.checks, unchecked + served.unchecked, modules + served.modules
            if served.ended:
                incomplete[target] = served.ended
            continue
        form = partial(
            open_artefact, target, opened, base=how.base_gguf, precision=how.precision, console=console,
            context=longest + GREEDY_TOKENS + MARGIN, beside=beside,
        )  # fmt: skip
        found, weak = _compared_with(form, live, probes, opened, source, partial(counted, console))
        checks, unchecked = checks + found, unchecked + weak
        if probes.too_long and not probes.labelled:
            why = f"every labelled row is longer than the {probes.most} tokens that fit into the budget"
            unchecked.append(Unchecked(found[0].artefact, "answers", why))
    read = f"{len(probes.rows)} {'held-out' if dataset else 'sampled'}"
    facts = {"model": live.text.name, "rows": read if probes.most is None else f"{read}, their first {probes.most} tokens"}
    if probes.too_long:
        labelled = probes.too_long + len(probes.labelled)
        facts["labelled rows left out"] = f"{probes.too_long} of {labelled}, longer than {probes.most} tokens"
    facts |= {"live adapter": "computed in float32", FACT: record(live.text, NAME).to_text()}
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    dated = tuple(replace(check, made=made) for check in checks)
    facts |= {VERIFIED: opened.note} if opened.note else {}
    return Certificate(f"What became of {of}", dated, facts, tuple(unchecked), tuple(modules), incomplete)


def _formats(opened: Opened, live: InTorch, precision: str, console: Console) -> dict[str, Callable[[str], InTorch]]:
    """The formats in which a server may compute, and the live adapter in each; in fp32 where it is to be rounded to few bits.

    None under a budget, where a second model does not fit into the free memory, and for float32: the limits are fixed then.
    """
    chosen = [name for name in ("float16", "bfloat16") if precision in ("auto", name)]
    chosen += [precision] if precision in FEW_BITS else []
    model = live.text.model
    width = torch.float32.itemsize if precision in FEW_BITS else torch.bfloat16.itemsize
    second = sum(parameter.numel() for parameter in model.parameters()) * width
    second += sum(buffer.nbytes for buffer in model.buffers())  # packed weights
    needed = second * _SECOND_MODEL
    if precision in FEW_BITS:  # matrices as they are, beside the rounded ones
        needed += sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 2)
    if not chosen or opened.residency.budget or needed > free_memory(live.text.device).bytes:
        return {}

    def in_format(name: str) -> InTorch:
        dtype = "float32" if name in FEW_BITS else name
        return InTorch(opened.text_model(console, dtype=dtype), NAME, f"live adapter in {name}")

    return dict.fromkeys(chosen, in_format)


def _earlier(opened: Opened) -> Earlier | None:
    """A and B of the last kept checkpoint that is another adapter than this one."""
    ours = {f"{path}.B": pair.B for path, pair in opened.adapter.pairs.items()}
    for path in reversed(found_checkpoints(opened.run.checkpoints) if opened.run else []):
        with suppress(Damaged):
            kept = load_checkpoint(path).trained
            if any(name in kept and not torch.equal(kept[name].to(value), value) for name, value in ours.items()):
                return path.name, kept
    return None


def _compared_with(
    form: Callable[[], AbstractContextManager[Artefact]],
    live: InTorch,
    probes: Probes,
    opened: Opened,
    source: Path,
    count: Count,
) -> tuple[list[Check], list[Unchecked]]:
    """The checks of the artefact that `form` opens, and what they cannot tell.

    Where weights are streamed, the artefact has gone before the live model computes.
    """
    live.text.release()
    with ExitStack() as stack:
        artefact = stack.enter_context(form())
        stored = artefact.stored(source, opened)
        if opened.residency.store is None:
            return _checks(live, artefact, stored, probes, opened, count)
        spill = opened.residency.waiting()
        with closing(spill):
            recorded = ask_all(artefact, probes, live, spill, count)
            recorded.let_go()
            del artefact
            stack.close()
            return _checks(live, recorded, stored, probes, opened, count)


def _checks(
    live: InTorch, artefact: Artefact, stored: Mapping[str, StoredTensor], probes: Probes, opened: Opened, count: Count
) -> tuple[list[Check], list[Unchecked]]:
    spec = opened.config.evaluate
    found = [check_prompts(live, artefact, probes), check_logits(live, artefact, probes, spec, count)]
    if probes.labelled:
        found.append(check_label_answers(live, artefact, probes, spec, count))
    found += [check_greedy(live, artefact, probes, count), check_stored(artefact.name, stored, artefact.allowed)]
    weak = weak_answers(found, probes.labelled, artefact.allowed)
    cannot = [] if weak is None else [weak]
    if all(check.passed for check in found[1:]):
        return found, cannot
    cause = cause_from_weights(stored, live, few_bits=artefact.allowed.rounding >= Q8.rounding)
    if not cause:  # from the first tokens of a row: enough to find it, and few enough to be in memory several times
        row = probes.rows[0].tolist()
        theirs = next(iter(artefact.logit_parts(row)))[:CAUSE_TOKENS]
        cause = cause_from_logits(live, row[: len(theirs)], theirs)
    said = f"{cause} {_next_step(artefact, found[-1])}"
    explained = (check if check.passed else replace(check, detail=f"{check.detail} {said}".strip()) for check in found[1:])
    return [found[0], *explained], cannot


def _next_step(artefact: Artefact, weights: Check) -> str:
    """What to try where every weight of a file is stored right, and only its rounding may be too coarse."""
    allowed = artefact.allowed
    if not (weights.passed and allowed.rounding >= Q8.rounding and artefact.name.endswith(".gguf")):
        return ""
    finer = "f16" if allowed.name == Q8.name else "q8_0 or f16"
    return (
        f"Its weights hold the adapter's change as exactly as {allowed.name} can, which may be too few for this model. "
        f"Next step: export it with --quant {finer} and see whether that passes."
    )


def keep_checks(run: RunFolder | None, certificate: Certificate, beside: Path) -> None:
    """Puts the checks into the certificate and report of a run; those of the same artefacts, and of deleted ones, go.

    `beside`: the folder that artefacts are named from.
    """
    if run is None:
        return
    again, renewed = {*certificate.artefacts}, {check.name for check in certificate.checks}
    before = read_certificate(run.certificate) if run.certificate.exists() else Certificate(f"The run {run.path}", ())
    kept = tuple(
        check
        for check in before.checks
        if check.name not in renewed
        and (not check.artefact or (check.artefact not in again and is_there(check.artefact, beside)))
    )
    missing = tuple(one for one in before.unchecked if one.artefact not in again and is_there(one.artefact, beside))
    earlier = {name: fact for name, fact in before.facts.items() if name != VERIFIED}
    facts, unchecked = {**certificate.facts, **earlier}, (*missing, *certificate.unchecked)
    modules = tuple(one for one in before.modules if one.artefact not in again and is_there(one.artefact, beside))
    ended = {name: why for name, why in before.incomplete.items() if name not in again and is_there(name, beside)}
    whole = replace(
        before,
        checks=(*kept, *certificate.checks),
        facts=facts,
        unchecked=unchecked,
        modules=(*modules, *certificate.modules),
        incomplete=ended | certificate.incomplete,
    )
    with writing(f"The certificate in {run.path}", "Free some space and verify again."):
        if run.report.exists():
            write_report(replace(read_report(run.report), certificate=whole), run.path)
        else:
            whole.write(run.certificate)
