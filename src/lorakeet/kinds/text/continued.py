"""Training that goes on from an adapter (lora.continue_from): with its targets, ranks and alphas, and its values as the start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from re import escape
from typing import TypeVar

import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError, Problems
from lorakeet.formats.detect import read_certified
from lorakeet.formats.identity import Uncertified, require_base, require_certified
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.fits import plan_of
from lorakeet.models.inject import trained_parameters
from lorakeet.models.text.from_config import local_files
from lorakeet.models.text.model import TextModel
from lorakeet.registry import BASE, START
from lorakeet.runs.certified import base_identity
from lorakeet.train.run import RunFolder

T = TypeVar("T", int, float)


def read_earlier(config: RunConfig, given: str | Path, say: Callable[[str], None] = lambda _: None) -> Adapter:
    """The adapter that a run begins with or is compared with. VerificationFailed as `earlier_note` says."""
    return read_certified(Path(given), uncertified=config.uncertified, say=say)[0]


def earlier_note(config: RunConfig) -> str:
    """What results say of such adapters: empty if all, and their bases, are what their certificates were made for.

    VerificationFailed if they are not, unless config.uncertified.
    """
    reference = config.train.registered.compared_with(config.train)
    named = [config.lora.earlier, None if reference in ("", BASE, START) else reference]
    said, uncertified = [], config.uncertified
    for path in (Path(one) for one in dict.fromkeys(named) if one is not None and Path(one).exists()):
        notes = (
            require_certified(path, uncertified=uncertified),
            require_base(path, partial(base_identity, config.model), quantised=True, uncertified=uncertified),
        )
        said += [f"started from {path}, {note}" for note in notes if isinstance(note, Uncertified)]
    return "; ".join(said)


def with_continued(config: RunConfig) -> RunConfig:
    """The settings with the targets, ranks and alphas of the adapter that lora.continue_from names, if it names one.

    Raises ConfigError for an adapter that has more than pairs, or pairs of several kinds; DataError if it cannot be read.
    """
    given = config.lora.continue_from
    if given is None:
        return config
    adapter, problems = read_earlier(config, given, print), Problems(f"The adapter {given} cannot be trained further")
    if adapter.extras or adapter.token_rows:
        problems.add("It has trained modules or token rows beside its pairs, which are not continued. Take one of pairs alone.")
    pairs = adapter.pairs
    for name, values in (
        ("scale rules", {pair.scale_rule for pair in pairs.values()}),
        ("variants", {"lora" if pair.magnitude is None else "dora" for pair in pairs.values()}),
    ):
        if len(values) > 1:
            problems.add(f"Its pairs have several {name} ({', '.join(sorted(values))}); expected one.")
    if any(pair.bias is not None for pair in pairs.values()):
        problems.add("Its pairs have biases, which are not trained. Take an adapter without them.")
    problems.raise_if_any()
    first = next(iter(pairs.values()))
    ranks, alphas = ({path: getattr(pair, what) for path, pair in pairs.items()} for what in ("rank", "alpha"))
    (rank, rank_pattern), (alpha, alpha_pattern) = _common(ranks), _common(alphas)
    lora = replace(
        config.lora, rank=int(rank), alpha=float(alpha),
        rank_pattern={key: int(value) for key, value in rank_pattern.items()},
        alpha_pattern={key: float(value) for key, value in alpha_pattern.items()},
        target_modules=tuple(pairs), exclude_modules=(), layers="all",
        scale_rule=first.scale_rule, variant="lora" if first.magnitude is None else "dora",
    )  # fmt: skip
    return replace(config, lora=lora)


def require_same_base(path: Path, adapter: Adapter, text: TextModel, config: RunConfig) -> None:
    """Raises ConfigError if the adapter in `path` is known to be of another base than `text`, unless config.uncertified.

    By the hash of the base's files where they are here; a base that is elsewhere, or not named, is taken to be the same.
    """
    if config.uncertified:
        return
    run = RunFolder.around(path)
    named = read_run(run.config).model.path if run is not None else adapter.named_base or adapter.base
    folder = local_files(named) if named else None
    if folder is None or not folder.is_dir() or not (folder / "config.json").is_file():
        return
    if folder.resolve() != text.source.resolve() and fingerprint(folder) != fingerprint(text.source):
        raise ConfigError(
            f"The adapter {path} was trained on {named}, and this run's base is {text.name}, whose weights are others. Name the "
            "base that it was trained on, or another adapter."
        )


def _common(values: dict[str, T]) -> tuple[T, dict[str, T]]:
    """The most frequent value, and the others by the regular expression of their path."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {escape(path): value for path, value in values.items() if value != most}


def start_from(text: TextModel, plan: Plan, adapter: Adapter, name: str) -> None:
    """Gives the pairs of `plan`, on the model as `name`, the values of `adapter`. Raises ConfigError if it has other pairs."""
    theirs = {entry.path: (entry.rank, entry.alpha) for entry in plan_of(text.model, adapter).entries}
    mine = {entry.path: (entry.rank, entry.alpha) for entry in plan.entries}
    if theirs != mine:
        other = sorted(set(theirs.items()) ^ set(mine.items()))[0][0]
        raise ConfigError(f"The adapter and the settings differ at {other}: leave lora's targets, ranks and alphas out.")
    parameters = trained_parameters(text.model, name)
    with torch.no_grad():
        for path, pair in adapter.pairs.items():
            for key, value in (("A", pair.A), ("B", pair.B), ("magnitude", pair.magnitude)):
                if value is not None:
                    parameters[f"{path}.{key}"].copy_(value)
