"""certificate.json: what was checked for equality with what, by how much it differs, and whether that is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.errors import DataError, VerificationFailed
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.values import decode, encode, from_text, put_text, to_text


@dataclass(frozen=True)
class Check:
    """One comparison of `left` with `right`: what was measured, what was allowed, and the verdict.

    `measured` and `tolerance` have the same keys. `floors` names the keys whose measured value must not be *below* the
    tolerance; all others must not be above. `estimates` holds the intervals of those measures that are means. `made` says when
    (UTC) and `against` what a server said that it was, so that an old check can be told from what is served now.
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

    @property
    def artefact(self) -> str:
        """The folder, file or server that the check is about, as in "run-merged/: logits"; empty for the adapter itself."""
        return self.name.rpartition(": ")[0]

    def exceeded(self) -> tuple[str, ...]:
        """The measures that are outside their tolerance; NaN always is."""
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
        told = f"{self.right} ({self.against})" if self.against else self.right
        made = f", made {self.made}" if self.made else ""
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.left} against {told}: {numbers}, n={self.n}{made}"


@dataclass(frozen=True)
class Unchecked:
    """Something of an artefact that was not compared, and why not."""

    artefact: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"not checked: {self.what} of {self.artefact}, since {self.why}"


@dataclass(frozen=True)
class Certificate:
    """The checks of a subject, a run or a file, and of what became of it elsewhere.

    `passed` speaks of the subject alone: it is what is trained, served, recommended and refused by. What became of it, a merged
    folder, a file, a server, has a verdict of its own in `artefacts`, and `verdict` says both in one sentence.
    """

    subject: str
    checks: tuple[Check, ...]
    facts: dict[str, str] = field(default_factory=dict)
    unchecked: tuple[Unchecked, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the subject's own checks were made, and all of them passed."""
        return bool(self.own) and all(check.passed for check in self.own)

    @property
    def artefacts(self) -> dict[str, bool]:
        """Every artefact that checks are about, by its name, and whether all of them passed."""
        names = dict.fromkeys(check.artefact for check in self.checks if check.artefact)
        return {name: all(check.passed for check in self.checks if check.artefact == name) for name in names}

    @property
    def failed_artefacts(self) -> tuple[str, ...]:
        """The artefacts of which a check failed."""
        return tuple(name for name, passed in self.artefacts.items() if not passed)

    @property
    def verdict(self) -> str:
        """What card, report and terminal say of it."""
        if not self.passed:
            return "Failed"
        return f"The own checks passed; {', '.join(self.failed_artefacts)} failed" if self.failed_artefacts else "Passed"

    @property
    def own(self) -> tuple[Check, ...]:
        """The checks of no artefact; all of them where there are no others, as in what lies beside an exported file."""
        return tuple(check for check in self.checks if not check.artefact) or self.checks

    def write(self, path: Path) -> None:
        """Writes certificate.json with "passed" and "artefacts" on top for machines; it is there whole or as it was before."""
        put_text(path, to_text({"passed": self.passed, "artefacts": self.artefacts, **encode(self)}))

    def raise_if_failed(self) -> None:
        """Raises VerificationFailed that names every failed check of the subject, its measures outside tolerance, its detail."""
        if self.passed:
            return
        if not self.checks:
            raise VerificationFailed(f"{self.subject} was not verified: no check was made; expected at least one.")
        lines = [f"{self.subject} does not compute what it should:"]
        for check in self.own:
            if not check.passed:
                lines.append(f"  - {check}. {check.detail}".rstrip())
        lines.append("Do not use it.")
        raise VerificationFailed("\n".join(lines))


def read_certificate(path: Path) -> Certificate:
    """The certificate in a certificate.json; DataError where it is missing, broken or says "passed" against its own checks."""
    try:
        data = from_text(dict[str, Any], path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the certificate {path}: {error}; expected a file that a verified run wrote.") from error
    claimed, artefacts = data.pop("passed", None), data.pop("artefacts", None)
    certificate = decode(Certificate, data, where=str(path))
    meant = {certificate.passed}
    if artefacts is None:  # an older file, whose "passed" spoke of all checks
        meant.add(bool(certificate.checks) and all(check.passed for check in certificate.checks))
    if claimed not in meant:
        raise DataError(f'{path} says "passed": {claimed}, but its checks say {certificate.passed}. Verify the artefact again.')
    if artefacts not in (None, certificate.artefacts):
        said = f'{path} says "artefacts": {artefacts}, but its checks say {certificate.artefacts}.'
        raise DataError(f"{said} Verify the artefacts again.")
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
    """The check of `measured` against `tolerance` (same keys), with `passed` worked out."""
    left, right = between
    check = Check(name, left, right, dict(measured), dict(tolerance), False, detail, n, floors)
    return Check(name, left, right, check.measured, check.tolerance, not check.exceeded(), detail, n, floors)


def worst_layer(differences: Mapping[str, float]) -> str:
    """A sentence that names the layer with the largest difference; NaN counts as the largest."""
    if not differences:
        return ""
    name = max(differences, key=lambda layer: (differences[layer] != differences[layer], differences[layer]))
    return f"The worst layer is {name}: it differs by {differences[name]:.3g} (of {len(differences)} layers)."
