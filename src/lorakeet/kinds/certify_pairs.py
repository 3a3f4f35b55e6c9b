"""The checks of the adapter's files: the tensors that were trained are those in them, and PEFT reads them as Lorakeet does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorakeet.data.chat import Example
from lorakeet.errors import is_of_the_device
from lorakeet.evaluate.certificate import Check, Unchecked, tolerance_check
from lorakeet.models.compare_saved import SavedDifference
from lorakeet.models.files.validate import first_line
from lorakeet.models.text.by_peft import IN_PEFT, ROUNDING, SHARE, compare_with_peft, peft_version, why_not_by_peft
from lorakeet.models.text.digests import changed_tensors
from lorakeet.models.text.model import TextModel

PAIRS = "trained = saved = loaded"
_WORDS = {
    "not_saved": "trained, but not in the file",
    "only_saved": "in the file, but not trained",
    "not_loaded": "trained, but not there once the file is loaded",
    "only_loaded": "there once the file is loaded, but not trained",
    "changed": "with other numbers in the file or once it is loaded",
}
_NAMED = 3


def check_frozen(before: Mapping[str, str], after: Mapping[str, str]) -> Check:
    """The check that no frozen tensor changed by a bit; names those that changed."""
    changed = changed_tensors(before, after)
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    detail = f"Training changed {', '.join(changed[:3])}{more}." if changed else ""
    found, allowed, between = (
        {"changed_tensors": float(len(changed))},
        {"changed_tensors": 0.0},
        ("before training", "after training"),
    )
    return tolerance_check("frozen weights", found, tolerance=allowed, between=between, n=len(before), detail=detail)


def check_saved(found: SavedDifference, folder: str) -> Check:
    """The check on what `compare_saved` found of the file in `folder`; names the tensors that differ."""
    names: dict[str, Sequence[str]] = {key: getattr(found, key) for key in _WORDS}
    said = [f"{_listed(names[key])} {words}" for key, words in _WORDS.items() if names[key]]
    detail = f"{'; '.join(said)}." if said else ""
    missing = {name for key, tensors in names.items() if key != "changed" for name in tensors}
    measured = {"missing_tensors": float(len(missing)), "changed_tensors": float(len(found.changed))}
    between = ("tensors of the live adapter", f"{folder}/, and the same loaded")
    return tolerance_check(
        PAIRS, measured, tolerance=dict.fromkeys(measured, 0.0), between=between, n=found.count, detail=detail
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}: {len(names)}"


def unchecked_in_peft(adapter: Path, why: str) -> Unchecked:
    """What the certificate says where PEFT's logits were not compared."""
    return Unchecked(f"{adapter.name}/{IN_PEFT}", "logits", why)


def check_by_peft(fresh: TextModel, name: str, adapter: Path, rows: Sequence[Example]) -> Check | Unchecked:
    """The check that the installed PEFT computes what the adapter `name` on `fresh` does; `fresh` is used up.

    The check is of PEFT, as of an artefact: where it fails, the adapter itself is as good as its own checks say.
    """
    if why := why_not_by_peft(fresh):
        return unchecked_in_peft(adapter, why)
    title = f"{adapter.name}/{IN_PEFT} {peft_version()}: logits"
    between = ("adapter by Lorakeet", "adapter loaded by PEFT, both in fp32")
    try:
        found = compare_with_peft(fresh, name, adapter, rows)
    except Exception as error:  # of any kind that PEFT raises
        if isinstance(error, ImportError | MemoryError) or is_of_the_device(error):  # of this machine, not of the adapter
            return unchecked_in_peft(adapter, f"PEFT could not be used here ({first_line(error)})")
        said = f"PEFT cannot load it: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return tolerance_check(title, {"not_loaded": 1.0}, tolerance={"not_loaded": 0.0}, between=between, detail=said)
    which = "median_logit" if found.median else "logit"
    measured, tolerance = {which: found.logit}, {which: ROUNDING}
    detail = "The adapter changes these logits too little to be distinguished from rounding."
    if found.of_effect is not None:
        measured["of_effect"], tolerance["of_effect"], detail = found.of_effect, SHARE, ""
    return tolerance_check(title, measured, tolerance=tolerance, between=between, n=found.tokens, detail=detail)
