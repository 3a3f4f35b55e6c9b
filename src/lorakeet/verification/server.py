"""A served model over HTTP, compared by its answers: prompt ids, likeliest tokens with their log-probabilities, greedy texts.

A server gives no whole logits. What it reports of a position, the likeliest tokens, is compared with the live model's
distribution:
KL over those tokens and all others as one, a lower bound of the whole KL. What it does not report is listed as not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from torch import Tensor

from lorakeet.core.lowrank import LoraPair
from lorakeet.data.chat import Ids
from lorakeet.data.template import decoded
from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.certificate import Check, ServedModules, Unchecked
from lorakeet.evaluate.intervals import mean, share
from lorakeet.evaluate.parity import kl_lower_bound
from lorakeet.evaluate.served.rounding_noise import FALSE_ALARM, Replica, RoundingLimits, rounding_limits, two_ways
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.tolerances import FEW_BITS, PRECISIONS, Allowed, allowed_by_rounding, precision_said
from lorakeet.models.generate.sample import end_ids
from lorakeet.models.inject import adapter_of
from lorakeet.planning.check import GREEDY_TOKENS
from lorakeet.runs.server_answer import CallRefused
from lorakeet.verification.artefact import InTorch
from lorakeet.verification.checks import answers_of_rows, check_ids, compare_labels, named_check
from lorakeet.verification.diagnose import LIKELY_CAUSE, cause_from_reported, changed_pairs
from lorakeet.verification.modules import MINUTES, Further, check_modules
from lorakeet.verification.probes import Probes
from lorakeet.verification.rounding import LIKELY, Place, Reading, Reported, replicas, replicas_of_few_bits, seen_by
from lorakeet.verification.same_file import check_same_file
from lorakeet.verification.server_apis import TOP, Token, Written, find_api
from lorakeet.verification.written_text import TextPosition, TextReading, read_text

PLACES = 8  # of a held-out row, if a server answers one position at a time
_LONGEST_TOKEN = 1000  # characters; a server may write more than was requested
NEARER = 2.0  # times nearer to the base than to the adapter: rounding leads away from both alike
_EXPLAINED = 4.0  # times the mean KL of one computation, which its format may explain


class Server:
    """A served model at `url`, which ends in #NAME where the server has several: http://127.0.0.1:8000#reviews."""

    def __init__(self, url: str, allowed: Allowed, key: str = "") -> None:
        """`key` is sent as a bearer token. EnvironmentProblem where nothing answers, ConfigError where several models do and none
        is named."""
        place, _, model = url.partition("#")
        self.allowed, self.name = allowed, url
        self.api = find_api(place.rstrip("/").removesuffix("/v1"), model, key)
        self.said = ""  # its number format, if that is what sets its limits

    def said_precision(self) -> str:
        """float32, float16 or bfloat16, if the server says that it computes so; else "".

        A format of fewer bits is another base than the trained one: it sets no limits by itself, and `said` has the remedy.
        """
        try:
            said = self.api.number_format()
        except EnvironmentProblem:  # it does not tell; if it has stopped answering, the first check says so
            return ""
        found = precision_said(said)
        self.said = f"The server says that its number format is {said}." if found else ""
        if found.endswith("bit"):
            self.said += f" If fewer bits than the trained base has are meant, give --precision {found}."
            return ""
        return found


Earlier: TypeAlias = "tuple[str, Mapping[str, Tensor]]"  # a checkpoint's name, and A and B by module
InFormat = Callable[[str], InTorch]  # the live adapter in a number format: float16 or bfloat16


@dataclass(frozen=True)
class _Way:
    """Computations of the live adapter in a number format that are alike, and the others in that format."""

    name: str
    computed: Sequence[Replica]
    others: Sequence[Replica]


@dataclass
class _Comparison:
    """One server against the live adapter, with what was found and what could not be looked at."""

    live: InTorch
    server: Server
    probes: Probes
    spec: EvaluateSpec
    formats: Mapping[str, InFormat] = field(default_factory=dict)  # in which the server may compute, the most exact first
    measured: str = ""  # what the limits are, where rounding was measured
    computed: Sequence[Replica] = ()  # in the format that explains the server
    earlier: Earlier | None = None
    say: Callable[[str], object] = lambda _: None  # what takes long, before it begins
    minutes: float = MINUTES  # for modules
    one_by_one: bool = False  # whether the server answers a place at a time
    checks: list[Check] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)
    modules: list[ServedModules] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, str]:
        """Both sides, as checks call them."""
        return self.live.name, self.server.name

    def skip(self, what: str, why: str = "the server does not tell") -> None:
        self.unchecked.append(Unchecked(self.server.name, what, why))

    def check_prompts(self) -> None:
        """The ids of conversations and raw texts, or at least how many a conversation has."""
        api, probes = self.server.api, self.probes
        pairs: list[tuple[list[int], list[int], str]] = []
        lengths = [0, 0]  # different, compared
        for messages, ids in probes.conversations:
            theirs = api.prompt(messages)
            if theirs is not None:
                pairs.append((ids.tolist(), theirs, "prompt"))
            elif (count := api.prompt_length(messages)) is not None:
                lengths = [lengths[0] + (count != len(ids)), lengths[1] + 1]
        talked = len(pairs)
        reported = [(text, api.tokenise(text)) for text in probes.texts]
        raw = [(self.live.tokenise(text), theirs, "raw text") for text, theirs in reported if theirs is not None]
        if pairs or raw:
            self.checks.append(check_ids(self.live, self.server.name, [*pairs, *raw]))
        if lengths[1]:
            detail = "Likely cause: another chat template, or a begin token more or less." if lengths[0] else ""
            wrong, allowed = {"different_lengths": float(lengths[0])}, {"different_lengths": 0.0}
            self.checks.append(named_check("prompt lengths", self.names, wrong, allowed, n=lengths[1], detail=detail))
        if not probes.conversations:
            self.skip("the chat template", "these rows do not go through one")
        elif not talked:
            self.skip("the token ids of conversations")
        if not raw:
            self.skip("the token ids of raw texts")

    def written(self, prompt: Ids, tokens: int) -> Written | None:
        """What the server writes after `prompt`; None where it takes no ids and no conversation has these."""
        api = self.server.api
        if api.takes_ids:
            found = api.write(prompt.tolist(), tokens)
        else:
            messages = next((talk for talk, ids in self.probes.conversations if np.array_equal(ids, prompt)), None)
            if messages is None:
                return None
            found = api.chat(messages, tokens)
        return replace(found, text=found.text[: tokens * _LONGEST_TOKEN], steps=found.steps[:tokens])

    def measure_rounding(self, held_out: Sequence[Reported], written: Sequence[Reported]) -> None:
        """Replaces the server's limits by what rounding does in the first number format that explains what it reports.

        The last format is taken if none does. Without formats, or without log-probabilities, the fixed limits stay. Mean KL and
        agreement are of the `held_out` places, or of what was `written` where there are none; single differences are of both.
        """
        rows = [one for one in held_out if one.places] or [one for one in written if one.places]
        others = [one for one in written if one.places and one not in rows]
        if not self.formats or not rows:
            return
        readings = [Reading.of(self.live, one.ids, one.places) for one in rows]
        readings += [Reading.of(self.live, one.ids, one.places, held_out=False) for one in others]
        seen = [
            (place.held_out, *place.against(theirs), theirs.get(place.top, -math.inf) >= max(theirs.values()))
            for reading, one in zip(readings, [*rows, *others], strict=True)
            for place, theirs in ((reading.places[number], known) for number, known in one.places.items())
        ]
        counted = [one for one in seen if one[0]]
        kl, worst = float(np.mean([one[1] for one in counted])), max((most for one in seen for most in one[2]), default=0.0)
        agreement = float(np.mean([one[3] for one in counted]))
        exact = PRECISIONS["float32"]
        if kl <= exact.parity.mean_kl and worst <= exact.logprob and agreement >= exact.parity.top1_agreement:
            fixed = RoundingLimits(exact.parity.mean_kl, exact.logprob, exact.parity.top1_agreement, exact.metric)
            self.server.allowed = allowed_by_rounding(exact, fixed)
            self.measured = "It computes like float32, whose limits are fixed."
            return
        answers = answers_of_rows(self.live, self.probes.labelled)
        way: _Way | None = None
        for found in self._ways(kl, readings, answers):
            try:
                limits = rounding_limits(found.computed, places=len(counted), rows=len(answers), others=found.others)
            except ValueError:  # numbers beyond the format's range: it is none in which this adapter is served
                continue
            way, self.server.allowed = found, allowed_by_rounding(PRECISIONS[found.name], limits)
            if kl <= limits.mean_kl and worst <= limits.difference and agreement >= limits.top1_agreement:
                break
        if way is None:
            return
        self.computed, limit = way.computed, self.server.allowed.parity.mean_kl
        folded = ", with pairs folded into the weights," if way.others and way.computed[0].folded else ""
        self.measured = (
            f"The limits are what rounding in {way.name}{folded} does, measured in {len(way.computed)} computations of the live "
            f"adapter; a right server exceeds them in at most 1 of {1 / FALSE_ALARM:,.0f} certificates. "
            f"{self._power(readings, limit)} {self._stale(readings, limit)}"
        ).strip()

    def _ways(self, kl: float, readings: Sequence[Reading], answers: Sequence[int]) -> Iterator[_Way]:
        """In each number format that may explain a mean KL of `kl`: with pairs beside the weights, then folded into them, where
        these are two ways."""
        last = list(self.formats)[-1]
        for name, in_format in self.formats.items():
            self.say(f"Computes the live adapter in {name} in several orders, to see what rounding may do.")
            least, load = 0.0 if name == last else kl / _EXPLAINED, partial(in_format, name)
            if bits := FEW_BITS.get(name):
                found = replicas_of_few_bits(load, bits, readings, self.probes.labelled, answers)
            else:
                found = replicas(load, readings, self.probes.labelled, answers, least)
            if len(found) > 1:
                yield from (_Way(name, *some) for some in two_ways(found))

    def _power(self, readings: Sequence[Reading], limit: float) -> str:
        """A sentence on the smallest wrong scale that the mean KL shows; KL grows with the square of what is missing."""
        tried = 0.1
        with changed_pairs(self.live, lambda _, pair: pair.B.mul_(1 - tried)):
            seen = [place.against(theirs)[0] for place, theirs, _ in seen_by(self.live, readings) if place.held_out]
        off = tried * math.sqrt(limit / moved) if (moved := float(np.mean(seen))) > 0 else math.inf
        if off < 1:
            return f"A scale that is {off:.2g} of itself off would exceed them."
        self.skip("whether the adapter is applied", "rounding explains as much as the adapter changes on these rows")
        return ""

    def _stale(self, readings: Sequence[Reading], limit: float) -> str:
        """A sentence on whether the adapter of an earlier checkpoint would be seen; empty where none is kept."""
        if self.earlier is None:
            return ""
        name, kept = self.earlier

        def as_it_was(path: str, pair: LoraPair) -> None:
            if f"{path}.A" in kept and f"{path}.B" in kept:
                pair.A.copy_(kept[f"{path}.A"])
                pair.B.copy_(kept[f"{path}.B"])

        with changed_pairs(self.live, as_it_was):
            seen = [place.against(theirs)[0] for place, theirs, _ in seen_by(self.live, readings) if place.held_out]
        times = float(np.mean(seen)) / limit
        would = "would exceed" if times > 1 else "would not exceed"
        return f"The adapter of {name} {would} them: its mean KL is {times:.2g} times the limit."

    def check_reported(self, reported: Sequence[Reported]) -> None:
        """Log-probabilities along held-out rows, or else along what the server wrote, against the live ones, place by place."""
        if not any(one.places for one in reported):
            self.skip("log-probabilities and their KL")
            return
        live, allowed = self.live, self.server.allowed
        kl, effect, agrees, texts = list[float](), list[float](), list[bool](), list[int]()
        bare, from_base = list[Place](), list[float]()
        worst, detail = 0.0, ""
        rows = [one.ids for one in reported]
        bases, lives = (side.logits_of_rows(rows) for side in (replace(live, adapter=None, name="base"), live))
        for number, one in enumerate(reported):
            base, ours = next(bases).log_softmax(-1), next(lives).log_softmax(-1)  # ROW_LOGITS tables while the last is made
            for place, known in one.places.items():
                kl.append(kl_lower_bound(ours[place], known))
                before = dict(zip(known, base[place][list(known)].tolist(), strict=True))
                effect.append(kl_lower_bound(ours[place], before))
                bare.append(Place(tuple(one.ids[: place + 1]), before, int(base[place].argmax())))
                from_base.append(kl_lower_bound(base[place], known))
                agrees.append(known.get(int(ours[place].argmax()), -math.inf) >= max(known.values()))
                texts.append(number)
                for token, value in known.items():
                    mine = float(ours[place][token])
                    if max(mine, value) >= LIKELY and abs(mine - value) > worst:
                        worst = abs(mine - value)
                        said = repr(decoded(live.text.tokenizer, [token]))
                        detail = f"The worst is {said} after token {place} of text {number}: {mine:.3f} here, {value:.3f} there."
            del base, ours  # before the next row's
        groups = texts if len(set(texts)) > 1 else None
        divergence = mean(np.array(kl), spec=self.spec, groups=groups)
        agreement = share(np.array(agrees), spec=self.spec, groups=groups)
        measured = {"mean_kl": divergence.value, "logprob_difference": worst, "top1_agreement": agreement.value}
        limits = {"mean_kl": allowed.parity.mean_kl, "logprob_difference": allowed.logprob}
        limits["top1_agreement"] = allowed.parity.top1_agreement
        moved = float(np.mean(effect))  # of the base on the same tokens
        share_allowed = allowed.parity.mean_kl / moved if self.measured and moved > 0 else allowed.parity.effect
        if math.isfinite(share_allowed) and moved > 0:
            measured["effect"], limits["effect"] = divergence.value / moved, share_allowed
        if moved > 0:
            limits["nearer_base"] = NEARER * max([1.0, *(_times_nearer(one, bare) for one in self.computed)])
            measured["nearer_base"] = _ratio(divergence.value, float(np.mean(from_base)))
        parts = (f"Of up to {TOP} likeliest tokens a place, all others as one.", detail, self.server.said, self.measured)
        detail = " ".join(part for part in parts if part)
        check = named_check(
            "log-probabilities", self.names, measured, limits, n=len(kl), detail=detail, floors=("top1_agreement",)
        )
        check = replace(check, estimates={"mean_kl": divergence, "top1_agreement": agreement})
        if not check.passed:
            most = max(reported, key=lambda one: len(one.places))
            why = cause_from_reported(live, most.ids, most.places)
            if not why.startswith(LIKELY_CAUSE) and measured.get("nearer_base", 0.0) > limits.get("nearer_base", math.inf):
                why = f"{LIKELY_CAUSE}: the adapter is not applied, or hardly: what the server says is nearer to the base."
            check = replace(check, detail=f"{check.detail} {why}".strip())
        self.checks.append(check)

    def along(self, ids: list[int]) -> dict[int, dict[int, float]]:
        """What the server reports of the tokens after each place of a row, or after some."""
        api = self.server.api
        reported = api.along(ids)
        if reported is None:
            self.one_by_one = True
            places = sorted({int(place) for place in np.linspace(0, len(ids) - 2, min(PLACES, len(ids) - 1))})
            return self.reported_at(ids, places)
        return self._by_id(ids, reported)

    def reported_at(self, ids: list[int], places: Sequence[int]) -> dict[int, dict[int, float]]:
        """What the server reports of the tokens after some places of a row, one answer a place."""
        answers = {place: self.server.api.write(ids[: place + 1], 1).steps for place in places}
        return self._by_id(ids, {place: steps[0].top for place, steps in answers.items() if steps})

    def _by_id(self, ids: list[int], reported: Mapping[int, Sequence[Token]]) -> dict[int, dict[int, float]]:
        """Log-probabilities by place and by token id. The live model is needed where tokens are reported by their texts alone."""
        within = {place: top for place, top in reported.items() if place < len(ids) - 1}
        if all(token.number is not None for top in within.values() for token in top):
            return {place: found for place, top in within.items() if (found := self._known_ids(top))}
        logits = self.live.logits(ids)
        tokenizer = self.live.text.tokenizer
        known = {place: TextPosition(tokenizer, logits[place], ids[place]).reported(top) for place, top in within.items()}
        return {place: found for place, found in known.items() if found}

    def _known_ids(self, top: Sequence[Token]) -> dict[int, float]:
        """The log-probabilities of tokens of the live model's vocabulary, the first of each id."""
        vocabulary, found = range(self.live.text.model.config.get_text_config().vocab_size), dict[int, float]()
        for token in top:
            if token.number is not None and token.number in vocabulary and token.logprob is not None:
                found.setdefault(token.number, token.logprob)
        return found

    def check_answers(self) -> None:
        """The task's metric on both sides, by the label that each writes, and on how many rows they write another one."""
        ends, ours, theirs, rows, undecided = end_ids(self.live.text), [], [], [], list[bool]()
        for row in self.probes.labelled:
            labels = [_said(self.live, ids.tolist()) for ids in row.completions]
            tokens = max(len(ids) for ids in row.completions)
            answer = self.written(row.prompt, tokens)
            if answer is None:
                continue
            rows.append(row)
            ours.append(_label(labels, _said(self.live, self.live.greedy(row.prompt.tolist(), tokens, ends))))
            theirs.append(_label(labels, answer.text or "".join(step.token.text for step in answer.steps)))
            undecided.append(ours[-1] != theirs[-1] and self._may_write(row.prompt.tolist(), answer))
        if rows:
            answers, allowed = (ours, theirs), self.server.allowed
            self.checks.append(compare_labels(self.names, answers, rows, allowed, self.spec, undecided=undecided))
        elif self.probes.labelled:
            self.skip("the task's answers", "the server takes no token ids, and these prompts are no conversations")

    def _may_write(self, prompt: list[int], answer: Written) -> bool:
        """Whether no token of an answer, all of which are known, is clearly worse than the live model's own."""
        reading = read_text(self.live, prompt, answer)
        return 0 < reading.tokens == len(answer.steps) and reading.gap <= self.server.allowed.gap

    def check_modules(self, reported: Sequence[Reported]) -> None:
        """Which blocks, kinds and modules are active there."""
        self.say("Leaves blocks, kinds and modules out of the live adapter, to see which are active on the server.")
        further = self._further()
        found = check_modules(self.live, reported, further, self.names, self.server.allowed.share, self.computed)
        if isinstance(found, str):
            self.skip("which modules are active", found)
        else:
            self.checks += found[0]
            self.modules.append(found[1])

    def check_same_file(self) -> None:
        """Whether it answers as the certified adapter does that is loaded beside it, where it loads any at run time."""
        rows, adapter = [ids.tolist() for ids in self.probes.rows], self.live.adapter
        if adapter is None or not rows:
            return
        if self.server.api.loads:
            self.say("Loads the certified adapter into the server once more, and unloads it.")
        found = check_same_file(self.server.api, self.names, adapter_of(self.live.text.model, adapter), rows)
        if isinstance(found, str):
            self.skip("whether the certified adapter, loaded beside it, gives the same answers", found)
        else:
            self.checks.append(found)

    def _further(self) -> Further:
        """How more is learned of the server; nothing more where a check has failed already."""
        takes_ids = self.server.api.takes_ids
        if not takes_ids or not all(check.passed for check in self.checks):
            return Further(self.reported_at if takes_ids and self.one_by_one else None, minutes=self.minutes)
        rows = [ids.tolist() for ids in self.probes.pool()]
        return Further(self.reported_at if self.one_by_one else self.along_at, self.one_by_one, rows, self.minutes)

    def along_at(self, ids: list[int], places: Sequence[int]) -> dict[int, dict[int, float]]:
        """What the server reports along a row, at these places."""
        wanted = frozenset(places)
        return {place: known for place, known in self.along(ids).items() if place in wanted}

    def read_writing(self) -> list[TextReading]:
        """The live model's view of what the server writes, token by token; empty where it cannot be read."""
        texts = [(prompt.tolist(), found) for prompt in self.probes.prompts if (found := self.written(prompt, GREEDY_TOKENS))]
        if not texts:
            self.skip("greedy texts", "the server takes no token ids, and these prompts are no conversations")
            return []
        readings = [read_text(self.live, prompt, found) for prompt, found in texts]
        if not any(reading.tokens or reading.steps for reading in readings) and all(found.text for _, found in texts):
            self.skip("greedy texts", "they begin with pieces of characters and the server does not tell their tokens")
            return []
        return readings

    def check_writing(self, readings: Sequence[TextReading]) -> None:
        """Whether the server's texts have the live log-probabilities, and no token that the live model finds clearly worse."""
        if not readings:
            return
        allowed = self.server.allowed
        worst = max(readings, key=lambda reading: reading.gap)
        measured = {"gap": worst.gap}
        if any(reading.differences for reading in readings):
            measured = {"logprob_difference": max(max(reading.differences, default=0.0) for reading in readings), **measured}
        detail, tokens = worst.detail, sum(reading.tokens for reading in readings)
        if not tokens:
            measured["gap"], detail = math.inf, detail or "The server wrote nothing."
        limits = {name: allowed.gap if name == "gap" else allowed.logprob for name in measured}
        self.checks.append(named_check("greedy text", self.names, measured, limits, n=tokens, detail=detail))


def _times_nearer(computed: Replica, bare: Sequence[Place]) -> float:
    """How many times nearer, in KL, a computation of the live adapter is to the base (`bare`) than to the adapter."""
    seen = [(one, computed.by_place.get(one.before, {})) for one in bare]
    from_base = [one.against(theirs)[0] for one, theirs in seen if one.ours.keys() <= theirs.keys()]
    return _ratio(float(computed.kl.mean()), float(np.mean(from_base))) if from_base else 0.0


def _ratio(of_adapter: float, of_base: float) -> float:
    return of_adapter / of_base if of_base > 0 else math.inf if of_adapter > 0 else 0.0


@dataclass(frozen=True)
class ServerFound:
    """The checks of everything that a server tells, what was not checked, and which modules are active there."""

    checks: list[Check]
    unchecked: list[Unchecked]
    modules: list[ServedModules]
    ended: str = ""  # why the server could not be queried to the end


def check_server(
    live: InTorch,
    server: Server,
    probes: Probes,
    spec: EvaluateSpec,
    formats: Mapping[str, InFormat] | None = None,
    *,
    minutes: float = MINUTES,
    earlier: Earlier | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> ServerFound:
    """Compares a server with the live adapter by everything that it tells; by its modules within `minutes`, if any.

    With `formats`, what rounding may do is measured on the live adapter; else the limits of the server are fixed. Whether the
    adapter of an `earlier` checkpoint would be seen is said then. `say` gets a line before what takes long.
    """
    found = _Comparison(live, server, probes, spec, formats or {}, earlier=earlier, say=say, minutes=minutes)
    ended, about = "", ""
    try:
        about = server.api.about()
        _compare(found)
    except EnvironmentProblem as error:
        if isinstance(error, CallRefused) and not _serves_it(server):
            found.checks.append(named_check("model", found.names, {"missing": 1.0}, {"missing": 0.0}, n=1, detail=f"{error}"))
        else:
            ended = str(error)
        found.skip("what comes after the last check", "the server stopped answering" if ended else "it has no such model")
    return ServerFound([replace(check, against=about) for check in found.checks], found.unchecked, found.modules, ended)


def _serves_it(server: Server) -> bool:
    """Whether the server lists the model; True where it does not tell."""
    try:
        return server.api.serves_it()
    except EnvironmentProblem:
        return True


def _compare(found: _Comparison) -> None:
    """All checks, one after another, into `found`."""
    server, probes = found.server, found.probes
    found.check_prompts()
    along = [Reported(row.tolist(), found.along(row.tolist())) for row in probes.rows] if server.api.takes_ids else []
    readings = found.read_writing()
    found.measure_rounding(along, [reading.reported for reading in readings])
    written = [reading.up_to(server.allowed.gap) for reading in readings]
    found.check_writing(written)
    reported = along if any(one.places for one in along) else [one.reported for one in written if one.reported.places]
    found.check_reported(reported)
    found.check_answers()
    if found.minutes:
        found.check_same_file()
        found.check_modules(reported)
    else:
        found.skip("which modules are active", "--no-modules was given")
    found.skip("the stored weights", "a server does not tell them")


def _said(live: InTorch, ids: Sequence[int]) -> str:
    return decoded(live.text.tokenizer, list(ids), skip_special_tokens=True).strip()


def _label(labels: Sequence[str], text: str) -> int:
    """The number of the longest label that `text` begins with; -1 where it begins with none."""
    found = [number for number, label in enumerate(labels) if text.strip().startswith(label)]
    return max(found, key=lambda number: len(labels[number]), default=-1)
