"""`lorakeet verify`: is what was merged, exported or served the model that was trained? Measured on the run's held-out rows.

live adapter in fp32  ──  the same ids, prompts, answers and texts  ──  each artefact of --against
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.data.chat import Candidates, Encoder, Ids
from lorakeet.data.prepare import Dataset
from lorakeet.data.rows import Row
from lorakeet.data.template import is_templated
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, Check, ServedModules, Unchecked, read_certificate
from lorakeet.evaluate.report.report import read_report, write_report
from lorakeet.evaluate.values import encode
from lorakeet.exporting.merged_tensors import StoredTensor
from lorakeet.exporting.runtime_support import Feature, Limit, Runtime, features_of_adapter, features_of_plan, has_head, limits_of
from lorakeet.exporting.tolerances import F16, FEW_BITS, PRECISIONS, Q8
from lorakeet.formats.detect import read_certified
from lorakeet.formats.identity import require_certified, with_note
from lorakeet.kinds.protocol import run_kind, run_without_text
from lorakeet.kinds.terminal import show_certificate
from lorakeet.kinds.text.evaluate import sampled_texts
from lorakeet.kinds.text.pairs_on_shapes import ties_head
from lorakeet.kinds.text.stacked import with_earlier
from lorakeet.memory.free import free_memory
from lorakeet.models.files.source import find_source
from lorakeet.models.text.from_config import config_of
from lorakeet.planning.check import (
    GREEDY_TOKENS,
    MARGIN,
    SAMPLED_TEXTS,
    SAMPLED_TOKENS,
    SERVERS,
    compared_rows,
    fit_check,
    maps_a_file,
    size_of_check,
)
from lorakeet.planning.fit import Say
from lorakeet.runs.open_adapter import NAME, Opened, open_adapter
from lorakeet.runs.output_paths import writing
from lorakeet.runs.residency import peak_said, temporary_stores
from lorakeet.serve.probe import FACT, record
from lorakeet.train.checkpoint import Damaged, load_checkpoint
from lorakeet.train.checkpoint import found as found_checkpoints
from lorakeet.train.progress import Count, counted
from lorakeet.train.run import RunFolder
from lorakeet.verbs.options import VerifyOptions, require_only
from lorakeet.verification.artefact import (
    Artefact,
    InTorch,
    Messages,
    artefact_name,
    is_there,
    live_side,
    open_artefact,
)
from lorakeet.verification.checks import (
    Probes,
    ask_all,
    check_greedy,
    check_logits,
    check_prompts,
    check_stored,
)
from lorakeet.verification.diagnose import cause_from_logits, cause_from_weights
from lorakeet.verification.label_answers import check_label_answers, weak_answers
from lorakeet.verification.server import Earlier, Server, check_server
from lorakeet.verification.server_apis import adapters_of
from lorakeet.verification.watch import parse_duration, watch_server

TEXTS, GREEDY = 8, 4  # raw texts, greedy continuations
RAW_TEXTS = ("It's 10:30 on 12/04.", "naïve café, 日本語 🙂", "two  spaces\n\n\tand a tab", "x = y+1; // 1,234.5")
_SECOND_MODEL = 2.0  # times its weights: while it is loaded, and with its logits
WATCHED_ROWS = 4
ROWS, POOL = 16, 128  # held-out rows that are compared; further ones, of which a server's proof may take some
UNPROVED = 4  # the exit code where nothing failed, and a wrong server might not have been seen
CAUSE_TOKENS = 128  # of a row, on which mistakes are tried


@dataclass(frozen=True)
class Verified:
    """What the comparison found."""

    certificate: Certificate
    watched: bool = False  # by few rows, which prove nothing

    @property
    def exit_code(self) -> int:
        """0, or 4 where a server is not proved; it is 3 where a check failed, which raises before this is returned."""
        return UNPROVED if self.certificate.unproved_artefacts and not self.watched else 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found = self.certificate
        return {"passed": found.passed, "artefacts": found.artefacts, "certificate": encode(found)}


@dataclass(frozen=True)
class VerifiedAdapters:
    """What was found of each adapter of a server, by its name; `failed` with what differs."""

    found: Mapping[str, Verified]
    failed: Mapping[str, str]
    without_run: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """3 where a check failed; 4 where an adapter is not proved, or no run of its name is there; else 0."""
        if self.failed:
            return VerificationFailed.exit_code
        return UNPROVED if self.without_run or any(one.exit_code for one in self.found.values()) else 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found = {name: one.to_mapping() for name, one in self.found.items()}
        return {"adapters": found, "failed": dict(self.failed), "without a run": list(self.without_run)}


VERIFIED = "verified adapter"  # the fact of how it was compared with its certificate


def verify(options: VerifyOptions, *, console: Console) -> Verified | VerifiedAdapters | Deployable:
    """Compares the adapter, live on its base in fp32, with every artefact in `against`, and writes what was found.

    The checks go into the run's certificate.json, report.json and report.html, beside what training put there, named by the paths
    of the artefacts; checks of artefacts that were deleted go. Of a folder of runs, each adapter that a server lists is compared
    with the run of its name. Raises VerificationFailed (exit code 3) with the worst layer or the first diverging token and the
    likely cause; ConfigError for an artefact that cannot be opened. With `deploy` nothing is compared: see `check_deployment`.
    `memory`, or else the run's memory.budget, is kept, if need be by streaming the models.
    """
    path = Path(options.run_or_adapter)
    if options.deploy is not None:
        return check_deployment(path, options.deploy, console, base=options.base, uncertified=options.uncertified)
    if options.watch is not None:
        return _watched(path, options.watch, options, console)
    if path.is_dir() and RunFolder.at(path) is None and not any(path.glob("*.safetensors")) and _one_server(options.against):
        return _verify_adapters(path, options, console)
    if (other := run_without_text(path)) is not None:
        kind, run, config = other
        require_only(options, ("run_or_adapter", "against", "uncertified"), config.kind)
        note = require_certified(path, uncertified=options.uncertified, say=console.print)
        found = with_note(kind.verify_run(run, config, options.against, console), note)
        show_certificate(found, console)
        _keep(run, found, path.absolute().parent)
        found.raise_if_failed()
        return Verified(found)
    opened = open_adapter(path, base=options.base, uncertified=options.uncertified, say=console.print).within(options.memory)
    options = replace(options, against=options.against or _found_beside(opened))
    source = find_source(opened.config.model, console.print)
    size = partial(size_of_check, opened, options.against, source, "this check", rows=_rows(options))
    opened = fit_check(opened, size, _place(opened), console)
    residency, mapped = opened.residency, maps_a_file(options.against)
    with peak_said(residency, console, mapped=mapped), temporary_stores(residency, "Nothing was compared."):
        certificate = certify_artefacts(opened, options, console, beside=_place(opened).parent)
    show_certificate(certificate, console)
    _keep(opened.run, certificate, _place(opened).parent)
    certificate.raise_if_failed()
    return Verified(certificate)


def _one_server(against: Sequence[str]) -> bool:
    """Whether the address of a server, without the name of a model, is all that is given."""
    return len(against) == 1 and against[0].startswith(SERVERS) and "#" not in against[0]


def _verify_adapters(folder: Path, options: VerifyOptions, console: Console) -> VerifiedAdapters:
    """Compares each adapter of a running server with the run of its name in `folder`. ConfigError where there is none."""
    say, url = partial(console.print, markup=False, soft_wrap=True), options.against[0]
    names = adapters_of(url)
    runs = {name: folder / name for name in names if Path(name).name == name and (folder / name).is_dir()}
    if not runs:
        raise ConfigError(f"{url} serves {names or 'no adapters'}; {folder} has no run of such a name.")
    found, failed = dict[str, Verified](), dict[str, str]()
    for name, run in runs.items():
        try:
            one = verify(replace(options, run_or_adapter=str(run), against=(f"{url}#{name}",)), console=console)
        except VerificationFailed as error:
            failed[name] = str(error)
            say(str(error), style="bold red")
            continue
        assert isinstance(one, Verified)
        found[name] = one
    without = tuple(name for name in names if name not in runs)
    for name in without:
        say(f"not proved  {url}#{name}: {folder} has no run of this name, so it was compared with nothing.", style="bold yellow")
    verdicts = {name: one.certificate.artefacts[f"{url}#{name}"] for name, one in found.items()} | dict.fromkeys(failed, "failed")
    say(f"{url}: {', '.join(f'{name} {verdict}' for name, verdict in verdicts.items())}.")
    return VerifiedAdapters(found, failed, without)


def _watched(path: Path, target: str, options: VerifyOptions, console: Console) -> Verified:
    """Compares a running server again and again; ConfigError for options that contradict each other."""
    if options.against:
        raise ConfigError("--watch and --against contradict each other; give --watch URL alone.")
    if not target.startswith(SERVERS):
        raise ConfigError(f"--watch is '{target}'; expected the address of a server, such as http://127.0.0.1:8000#reviews.")
    if options.rounds < 0:
        raise ConfigError(f"--rounds is {options.rounds}; it must be 0 (no end) or more.")
    every = parse_duration(options.every)
    opened = open_adapter(path, base=options.base, uncertified=options.uncertified, say=console.print).within(options.memory)
    few = replace(options, against=(target,), rows=min(_rows(options), WATCHED_ROWS), modules=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def compare() -> Certificate:
        return certify_artefacts(opened, few, console, beside=_place(opened).parent)

    found = watch_server(compare, target, every, rounds=options.rounds, metrics=options.metrics, say=say)
    return Verified(found, watched=True)


def certify_artefacts(
    opened: Opened, options: VerifyOptions, console: Console, *, beside: Path | None = None, key: str = ""
) -> Certificate:
    """Returns the checks of every artefact of `options.against` against the live adapter, each named by the artefact's path.

    Servers are sent `key`.
    """
    dataset = opened.dataset if opened.run else None
    source = find_source(opened.config.model, console.print)
    live, say = live_side(opened, console), partial(console.print, markup=False, soft_wrap=True)
    probes = probes_of(opened, dataset, live, _rows(options))
    probes = probes if options.rows is None else replace(probes, pool=tuple)
    longest = max((len(ids) for ids in (*probes.rows, *probes.prompts)), default=0)
    checks: list[Check] = []
    unchecked: list[Unchecked] = []
    modules: list[ServedModules] = []
    incomplete: dict[str, str] = {}
    for target in options.against:
        shown = target if target.startswith(SERVERS) else artefact_name(Path(target), beside)
        say(f"Comparing {shown} with the live adapter.")
        if target.startswith(SERVERS):
            server = Server(target, F16, key)
            precision = (server.said_precision() if options.precision == "auto" else "") or options.precision
            server.allowed = F16 if precision == "auto" else PRECISIONS[precision]
            formats = _formats(opened, live, precision, console)
            spec, earlier = opened.config.evaluate, _earlier(opened)
            minutes = options.minutes if options.modules else 0.0
            served = check_server(live, server, probes, spec, formats, minutes=minutes, earlier=earlier, say=say)
            checks, unchecked, modules = checks + served.checks, unchecked + served.unchecked, modules + served.modules
            if served.ended:
                incomplete[target] = served.ended
            continue
        form = partial(
            open_artefact, target, opened, base=options.base_gguf, precision=options.precision, console=console,
            context=longest + GREEDY_TOKENS + MARGIN, beside=beside,
        )  # fmt: skip
        found, weak = _compared_with(form, live, probes, opened, source, partial(counted, console))
        checks, unchecked = checks + found, unchecked + weak
        if probes.too_long and not probes.labelled:
            why = f"every labelled row is longer than the {probes.most} tokens that fit into the budget"
            unchecked.append(Unchecked(found[0].artefact, "answers", why))
    rows = f"{len(probes.rows)} {'held-out' if dataset else 'sampled'}"
    facts = {"model": live.text.name, "rows": rows if probes.most is None else f"{rows}, their first {probes.most} tokens"}
    if probes.too_long:
        labelled = probes.too_long + len(probes.labelled)
        facts["labelled rows left out"] = f"{probes.too_long} of {labelled}, longer than {probes.most} tokens"
    facts |= {"live adapter": "computed in float32", FACT: record(live.text, NAME).to_text()}
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    dated = tuple(replace(check, made=made) for check in checks)
    facts |= {VERIFIED: opened.note} if opened.note else {}
    return Certificate(f"What became of {options.run_or_adapter}", dated, facts, tuple(unchecked), tuple(modules), incomplete)


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


def probes_of(opened: Opened, dataset: Dataset | None, live: InTorch, rows: int) -> Probes:
    """Held-out rows of the run; for a bare adapter, texts that the base samples. DataError where no row is short enough."""
    if dataset is None:
        spec = opened.config.evaluate
        sampled = [example.ids for example in sampled_texts(live.text, SAMPLED_TEXTS, SAMPLED_TOKENS, seed=spec.seed)]
        return Probes([], RAW_TEXTS, sampled, [], [ids[: max(1, len(ids) // 2)] for ids in sampled[:GREEDY]])
    encoder = Encoder(live.text.tokenizer, opened.config.data, dataset.labels)
    chosen, labelled = compared_rows(dataset, encoder, rows)
    starts = [int(np.flatnonzero(example.supervised)[0]) for _, example in chosen]
    prompts = [example.ids[:start] for (_, example), start in zip(chosen, starts, strict=True)]
    talks: list[tuple[Messages, Ids]] = [
        (_messages(row), prompt)
        for (row, _), prompt in zip(chosen, prompts, strict=True)
        if is_templated(row, live.text.tokenizer, opened.config.data) and len(_messages(row)) > 0
    ]
    texts = (*RAW_TEXTS, *(row.text for row, _ in chosen[:TEXTS]))
    ids = [example.ids for _, example in chosen]
    longest = opened.residency.way.longest or (max(map(len, ids)) if opened.config.memory.limit else None)
    others = [row for row in dataset.held_out if not any(row is one for one, _ in chosen)]
    further = partial(_further, others, encoder, longest) if labelled and opened.residency.store is None else _no_further
    pool = partial(_pool, others, encoder, longest) if opened.residency.store is None else tuple
    found = Probes(talks, texts, ids, labelled, prompts[:GREEDY], further=further, pool=pool)
    return found.cut_to(opened.residency.way.longest)


def _pool(rows: Sequence[Row], encoder: Encoder, longest: int | None) -> list[Ids]:
    """The ids of the first POOL whole rows within the memory plan."""
    encoded = (found for row in rows if (found := encoder.encode(row)) is not None and not found.truncated)
    return list(islice((one.ids for one in encoded if longest is None or len(one.ids) <= longest), POOL))


def _rows(options: VerifyOptions) -> int:
    """How many held-out rows are compared. ConfigError for none."""
    rows = ROWS if options.rows is None else options.rows
    if rows < 1:
        raise ConfigError(f"--rows is {rows}; expected 1 or more.")
    return rows


def _no_further(count: int) -> list[Candidates]:
    """Outputs of more rows would wait on disk beyond what was planned."""
    return []


def _further(rows: Sequence[Row], encoder: Encoder, longest: int | None, count: int) -> list[Candidates]:
    """The labelled prompts of the first `count` rows that are whole, and within the memory plan: `longest` tokens."""
    encoded = (found for row in rows if (found := encoder.candidates(row)) is not None and not found.truncated)
    fitting = (one for one in encoded if longest is None or len(one.prompt) + max(map(len, one.completions)) <= longest)
    return list(islice(fitting, count))


def _messages(row: Row) -> Messages:
    """The turns before the first that the model is to write."""
    number = next((place for place, turn in enumerate(row.turns) if turn.supervised), 0)
    return [{"role": turn.role, "content": turn.text} for turn in row.turns[:number]]


def _found_beside(opened: Opened) -> tuple[str, ...]:
    """What earlier commands wrote under the names that they print: RUN-merged, RUN-gguf and RUN-ollama."""
    place = _place(opened)
    known = [place.with_name(f"{place.name}{ending}") for ending in ("-merged", ".gguf", "-ollama")]
    found = tuple(str(path) for path in known if path.exists())
    if not found:
        raise ConfigError(
            f"There is nothing to compare {place.name} with: name it with --against (a merged folder, a .gguf file, an http "
            f"address). Looked for {', '.join(path.name for path in known)} beside it."
        )
    return found


def _place(opened: Opened) -> Path:
    return Path(os.path.abspath(opened.run.path if opened.run else opened.folder))


def _keep(run: RunFolder | None, certificate: Certificate, beside: Path) -> None:
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


@dataclass(frozen=True)
class Deployable:
    """Nothing stands in the way; `notes` are what the runtime needs."""

    exit_code: ClassVar[int] = 0
    runtime: str
    features: tuple[str, ...]
    notes: tuple[Limit, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        notes = [{"feature": limit.feature, "what": limit.what, "remedy": limit.remedy} for limit in self.notes]
        return {"runtime": self.runtime, "loads": True, "features": list(self.features), "notes": notes}


def check_deployment(
    config_or_run: Path, runtime: Runtime, console: Console, *, base: str | None = None, uncertified: bool = False
) -> Deployable:
    """What `runtime` will do with the adapter of a run file, a run or an adapter folder; `base` wins over the model named there.

    Raises VerificationFailed (exit code 3) listing every feature that it refuses or computes wrongly, with what helps.
    ConfigError where settings do not fit the model, or where its configuration is needed and cannot be had.
    """
    say, planned = partial(console.print, markup=False, soft_wrap=True), config_or_run.is_file()
    features = _planned(config_or_run, base, say) if planned else _finished(config_or_run, base, runtime, say, uncertified)
    limits = limits_of(runtime, features)
    bad = [limit for limit in limits if limit.effect != "note"]
    if bad:
        what = "would not load" if planned else "does not load"
        lines = [f"The adapter of {config_or_run} {what} rightly in {runtime}:"]
        words = {"refused": "is refused", "wrong": "is computed wrongly, without a word"}
        lines += [f"  - {limit.feature} {words[limit.effect]}: {limit.what} ({limit.evidence}). {limit.remedy}" for limit in bad]
        raise VerificationFailed("\n".join(lines))
    for limit in limits:
        console.print(f"{runtime}: {limit.feature}: {limit.what}. {limit.remedy}", soft_wrap=True)
    listed = ", ".join(sorted(features)) or "plain pairs of one rank and scale"
    console.print(f"The adapter of {config_or_run} ({listed}) loads in {runtime}.", soft_wrap=True)
    return Deployable(runtime, tuple(sorted(features)), limits)


def _planned(run_file: Path, base: str | None, say: Say) -> frozenset[Feature]:
    """Of the plan that the run will have, made on the model's shapes alone."""
    config = with_earlier(read_run(run_file))
    if base is not None:
        config = config.changed(model={"path": base})
    first = max([config.lora.rank, *config.lora.rank_pattern.values()])
    auto = {"auto": config.ranks.max_rank, "prune": first}.get(config.ranks.choose, 0)
    plan, tied = run_kind(config).planned_pairs(config, say)
    return features_of_plan(plan, tied=tied, auto=auto)


def _finished(folder: Path, base: str | None, runtime: Runtime, say: Say, uncertified: bool) -> frozenset[Feature]:
    """Of an adapter as it is; its base is read only if a pair is on the head and `runtime` minds a tied one."""
    adapter, _ = read_certified(folder, uncertified=uncertified, say=say)
    asks = has_head(adapter.pairs) and bool(limits_of(runtime, ("tied head pairs",)))
    if not asks:
        return features_of_adapter(adapter, tied=False)
    opened = open_adapter(folder, base=base, uncertified=True, say=lambda _: None)  # what is odd about it was said before
    return features_of_adapter(adapter, tied=ties_head(config_of(opened.config.model, say)))
