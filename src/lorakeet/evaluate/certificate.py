"""certificate.json: which results were compared, how much they differ, and whether that is within tolerance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lorakeet.disk import read_regular
from lorakeet.errors import DataError, EnvironmentProblem, VerificationFailed, reader
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.values import decode, encode, from_text, put_text, to_text

CERTIFICATE = "certificate.json"
_DIGEST = "sha256"  # the key of a certificate's own digest
_SHOWN = 5  # names in a line; the file has all


def is_address(name: str) -> bool:
    """Whether an artefact is a server's address."""
    return name.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Check:
    """One comparison of `left` with `right`: measured values, tolerances and verdict.

    `measured` and `tolerance` have the same keys. For keys in `floors` the measured value must not be *below* the tolerance, for
    all others not above. `estimates` has the intervals of measures that are means. `made` is the time (UTC) and `against` the
    server's description of itself, so that an old check is distinguishable from what is served now.
    """

    name: str
    left: str
    right: str
    measured: dict[str, float]
    tolerance: dict[str, float]
    passed: bool
    detail: str = ""
    n: int = 0
    floors: tuple[str, ...] = ()
    estimates: dict[str, Estimate] = field(default_factory=dict)
    made: str = ""
    against: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError where a measure has no tolerance, or a tolerance no measure."""
        if lone := self.measured.keys() ^ self.tolerance.keys():
            raise ValueError(f"'{min(lone)}' is in only one of measured and tolerance")

    @property
    def artefact(self) -> str:
        """The folder, file or server under test, as in "run-merged/: logits"; empty for the adapter itself."""
        return self.name.rpartition(": ")[0]

    def exceeded(self) -> tuple[str, ...]:
        """The measures outside their tolerance; NaN always is."""
        return tuple(
            key
            for key, limit in self.tolerance.items()
            if not (self.measured[key] >= limit if key in self.floors else self.measured[key] <= limit)
        )

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{key.replace('_', ' ')} {value:.3g} ({'at least' if key in self.floors else 'at most'} {self.tolerance[key]:.3g})"
            for key, value in self.measured.items()
        )
        other = f"{self.right} ({self.against})" if self.against else self.right
        made = f", made {self.made}" if self.made else ""
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.left} against {other}: {numbers}, n={self.n}{made}"


@dataclass(frozen=True)
class Unchecked:
    """A part of an artefact that was not compared, and the reason."""

    artefact: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"not checked: {self.what} of {self.artefact}, since {self.why}"


Verdict: TypeAlias = Literal["proved", "not proved", "failed"]


@dataclass(frozen=True)
class ServedModules:
    """What a server's answers show of the adapted modules, one by one and in groups (all of them, each block, each kind).

    A module is shown active, shown missing, or not distinguished (with the reason). A group is in `seen` if a server that lacks
    it would have been found, at `power`; else in `unseen`. `nats` are the effects of what is not shown, as KL a token.
    """

    artefact: str
    active: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unclear: dict[str, str] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    unseen: dict[str, str] = field(default_factory=dict)
    nats: dict[str, float] = field(default_factory=dict)
    power: float = 0.0

    @property
    def proved(self) -> bool:
        """Whether the lack of any group would have been seen."""
        return bool(self.seen) and not self.unseen and not self.missing

    @property
    def counts(self) -> str:
        """How many modules are active, missing and not distinguished."""
        total = len(self.active) + len(self.missing) + len(self.unclear)
        others = {"missing": len(self.missing), "not distinguished": len(self.unclear)}
        said = [f"{count} {what}" for what, count in others.items() if count]
        return ", ".join([f"active {len(self.active)} of {total}", *said])

    def __str__(self) -> str:
        verdict = "FAIL" if self.missing else "proved" if self.proved else "not proved"
        shown = f"{len(self.seen)} of {len(self.seen) + len(self.unseen)} groups (all, each block, each kind)"
        parts = [f"{verdict}  {self.artefact}: modules {self.counts}; the lack of {shown} would be seen, power {self.power:.4g}"]
        for what, names in (("groups", self.unseen), ("modules", self.unclear)):
            if names:
                parts.append(f"not proved of {what}: {self._weakest(tuple(names))}")
        return "; ".join(parts)

    def _weakest(self, names: tuple[str, ...]) -> str:
        """Those of the largest effect first: so much may be missing unseen."""
        ordered = sorted(names, key=lambda name: -self.nats.get(name, 0.0))
        said = [f"{name} ({self.nats[name]:.2g} nats)" if name in self.nats else name for name in ordered[:_SHOWN]]
        return ", ".join(said) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")


@dataclass(frozen=True)
class Certificate:
    """The checks of a subject (a run or a file) and of artefacts made from it.

    `passed` is about the subject alone; training, serving and recommendations depend on it. Each artefact (a merged folder, a
    file, a server) has its own verdict in `artefacts`. `verdict` says both in one sentence.
    """

    subject: str
    checks: tuple[Check, ...]
    facts: dict[str, str] = field(default_factory=dict)
    unchecked: tuple[Unchecked, ...] = ()
    modules: tuple[ServedModules, ...] = ()
    incomplete: dict[str, str] = field(default_factory=dict)  # by artefact, why its checks ended early
    identity: dict[str, str] = field(default_factory=dict)  # what the adapter and its base hold (formats/identity)
    report: str = ""  # the digest of the report that was written with it, without the certificate there

    @property
    def passed(self) -> bool:
        """True if the subject has checks of its own and all of them passed; about artefacts alone, if none is incomplete."""
        ended = bool(self.incomplete) and all(check.artefact for check in self.checks)
        return bool(self.own) and all(check.passed for check in self.own) and not ended

    @property
    def artefacts(self) -> dict[str, Verdict]:
        """By name of artefact, its verdict. A file's weights are all compared; of a server it is *proved* what would be seen."""
        names = dict.fromkeys([*(check.artefact for check in self.checks if check.artefact), *self.incomplete])
        return {name: self._verdict_of(name) for name in names}

    def _verdict_of(self, name: str) -> Verdict:
        if name in self.incomplete or not all(check.passed for check in self.checks if check.artefact == name):
            return "failed"
        if is_address(name) and not any(one.proved for one in self.modules if one.artefact == name):
            return "not proved"
        return "proved"

    def _named(self, verdict: Verdict) -> tuple[str, ...]:
        return tuple(name for name, found in self.artefacts.items() if found == verdict)

    @property
    def failed_artefacts(self) -> tuple[str, ...]:
        """The artefacts with a failed check, and those whose checks ended early."""
        return self._named("failed")

    @property
    def unproved_artefacts(self) -> tuple[str, ...]:
        """The servers of which all that was compared agrees, and too little would have been seen."""
        return self._named("not proved")

    @property
    def verdict(self) -> str:
        """The verdict for model card, report and terminal."""
        if not self.passed:
            return "Failed"
        words = {"failed": self.failed_artefacts, "is not proved": self.unproved_artefacts}
        said = [f"{', '.join(names)} {word}" for word, names in words.items() if names]
        if said and all(check.artefact for check in self.checks):
            return f"Not failed; {'; '.join(said)}"
        return f"The own checks passed; {'; '.join(said)}" if said else "Passed"

    @property
    def own(self) -> tuple[Check, ...]:
        """The checks of no artefact; all checks if there are no others, as beside an exported file."""
        return tuple(check for check in self.checks if not check.artefact) or self.checks

    def write(self, path: Path) -> None:
        """Writes certificate.json atomically, with "passed" and "artefacts" first, for machines, and its own digest last."""
        put_text(path, with_digest(to_text({"passed": self.passed, "artefacts": self.artefacts, **encode(self)})))

    def raise_if_failed(self) -> None:
        """Raises VerificationFailed that names every failed check of the subject with its measures and detail.

        EnvironmentProblem where none failed, and some could not be made.
        """
        if self.passed:
            return
        if self.incomplete and all(check.passed for check in self.own):
            name, why = next(iter(self.incomplete.items()))
            raise EnvironmentProblem(f"{why} {len(self.checks)} checks of {name} passed until then; they are incomplete.")
        if not self.checks:
            raise VerificationFailed(f"{self.subject} was not verified: it has no check; expected at least one.")
        lines = [f"{self.subject} does not compute what it should:"]
        for check in self.own:
            if not check.passed:
                lines.append(f"  - {check}. {check.detail}".rstrip())
        lines.append("Do not use it.")
        raise VerificationFailed("\n".join(lines))


def with_digest(text: str) -> str:
    """The text of a certificate with the SHA-256 of all else in it, made anew: it finds an edit, and stops no forger."""
    data = json.loads(text)
    data.pop(_DIGEST, None)
    return to_text({**data, _DIGEST: digest_of_json(data)})


def pop_digest(data: dict[str, Any]) -> bool | None:
    """Removes the digest that `with_digest` wrote. Returns whether it matches the rest; None if there is none."""
    digest = data.pop(_DIGEST, None)
    return None if digest is None else digest == digest_of_json(data)


def digest_of_json(data: Mapping[str, Any]) -> str:
    """The SHA-256 of what a JSON object says, whatever its white space and order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@reader("a certificate")
def read_certificate(path: Path) -> Certificate:
    """Reads a certificate.json. Raises DataError if it is missing, broken, edited, or if "passed" contradicts its checks."""
    try:
        data = from_text(dict[str, Any], read_regular(path).decode("utf-8"), where=str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path.parent} has no {path.name}: a run, a merge and an export have theirs when they have ended."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the certificate {path}: {error}; expected a file that a verified run wrote.") from error
    matches = pop_digest(data)
    edited = bool(data.get("identity")) if matches is None else not matches
    claimed, artefacts = data.pop("passed", None), data.pop("artefacts", None)
    certificate = decode(Certificate, data, where=str(path))
    expected = {certificate.passed}
    if artefacts is None:  # an older file, whose "passed" covered all checks
        expected.add(bool(certificate.checks) and all(check.passed for check in certificate.checks))
    if not isinstance(claimed, bool) or claimed not in expected:
        raise DataError(f'{path} says "passed": {claimed}, but its checks say {certificate.passed}. Verify the artefact again.')
    found: dict[str, Any] = dict(certificate.artefacts)
    if isinstance(artefacts, dict) and all(isinstance(value, bool) for value in artefacts.values()):  # an older file's words
        found = {name: verdict != "failed" for name, verdict in found.items()}
    if artefacts not in (None, found):
        said = f'{path} says "artefacts": {artefacts}, but its checks say {found}.'
        raise DataError(f"{said} Verify the artefacts again.")
    if edited:
        raise DataError(
            f"{path} was edited after it was written: its digest is of another text. Put back the file that was written."
        )
    return certificate


def tolerance_check(
    name: str,
    measured: Mapping[str, float],
    *,
    tolerance: Mapping[str, float],
    between: tuple[str, str],
    floors: tuple[str, ...] = (),
    n: int = 0,
    detail: str = "",
) -> Check:
    """Compares `measured` with `tolerance` (same keys)."""
    left, right = between
    check = Check(name, left, right, dict(measured), dict(tolerance), False, detail, n, floors)
    return Check(name, left, right, check.measured, check.tolerance, not check.exceeded(), detail, n, floors)


def worst_layer(differences: Mapping[str, float]) -> str:
    """A sentence that names the layer with the largest difference (NaN counts as largest)."""
    if not differences:
        return ""
    name = max(differences, key=lambda layer: (differences[layer] != differences[layer], differences[layer]))
    return f"The worst layer is {name}: it differs by {differences[name]:.3g} (of {len(differences)} layers)."
