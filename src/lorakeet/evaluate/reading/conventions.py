"""What the references of a file say about how an answer is read: kind, labels, decimal mark, and what tells two of them apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
import regex

from lorakeet.evaluate.intervals import Floats
from lorakeet.evaluate.reading.letter_case import are_formulas, case_differs, other_unit
from lorakeet.evaluate.reading.numbers import Number, answering, decimal_mark, in_kelvin, whole_number
from lorakeet.evaluate.reading.texts import DOTLESS, bare, folded, plain, unfenced, words

Kind = Literal["JSON", "numbers", "ordered labels", "sets of labels", "short texts", "texts"]

NEARLY_ALL = 0.9  # of the references must be of a kind
SHORT = 8  # words: references of at most so many, by their median, must be matched; longer ones are compared by chrF
MOST = 5000  # training answers that are looked at, of at most
CHARACTERS = 300_000
MOST_LEVELS = 11  # of a scale, as from 0 to 10
ROWS_A_LEVEL = 5  # that a scale of whole numbers has on average, at least
TIMES_A_LABEL = 3  # that a label of sets occurs on average, at least
LABEL_WORDS = 4  # that it has at most
SEVERAL = 0.3  # of the references must have two labels or more
EITHER_ORDER = 0.1  # of neighbouring labels may stand in the rarer order: where order varies it may mean something
SEPARATORS = (";", "|", ",", "\n")
_LEAD_IN = regex.compile(
    r"^\W*(?:(?:so|the|my|final|correct|right|die|la|el)\s+)*(?:answer|label|category|class|result|antwort|réponse|respuesta|cevap)"
    r"\s*(?:(?:is|ist|est|es)\b\s*[:=]?|[:=])\s*|^\W*(?:option|choice)\s+",
    regex.I,
)
_CLAUSE = regex.compile(r"[.,;:)\n]+(?=\s|$)|\s[-–—]+\s|—")
_MARKED = regex.compile(r"####|\\boxed\s*\{")
_CODE = regex.compile(r"\w[(\[]|[{};]\s*$|[=!<>]=|[=-]>|&&|\|\||(?<!\w)[!*&~]\w|\\[wdsb]", regex.M)
_TOKEN = regex.compile(r"\w+|\S")
_BRACKET = regex.compile(r"[()\[\]{}]")
_KINDS = dict(zip("()[]{}", "(([[{{", strict=True))
_ONE_KIND = str.maketrans("[]{}", "()()")
_END = r"\s*[-+]?(?:[\d.]+|∞|\\?inf(?:ty|inity)?)\s*"
_INTERVAL = regex.compile(rf"[(\[]{_END}[,;]{_END}[)\]]", regex.I)
_IN_BRACKETS = regex.compile(r"(?<![\w)])(\p{Sc}?)\((\p{Sc}?)\s*(\d[\d.,]*)\s*(%?)\)")


@dataclass(frozen=True, eq=False)
class Conventions:
    """How the answers of a file are read. `why` says it to the reader.

    `alike` are the references that are equal but for case and signs, by what is left. `scale` are ordered labels with their
    places; `separator` stands between the labels of a set, and is "[" for JSON lists. `range` and `middle` are of its numbers,
    and `unit` is theirs.
    """

    kind: Kind = "texts"
    why: str = ""
    decimal: str = "."
    turkish: frozenset[str] | None = None
    alike: Mapping[str, frozenset[str]] = field(default_factory=dict)
    scale: Mapping[str, int] = field(default_factory=dict)
    separator: str = ""
    labels: frozenset[str] = frozenset()
    range: float = 0.0
    middle: float = 0.0
    unit: str = ""
    measured: bool = False  # most numbers have decimals: how near an answer comes matters, and hardly one is equal
    shares: bool = False  # its numbers lie between -1 and 1 without %: 12 % is 0.12
    code: bool = False  # most texts are code: every sign counts
    formulas: bool = False  # its references are chemical formulas: CO is not Co
    brackets: bool = False  # two of its references differ by the kind of brackets alone
    kelvin: bool = False  # K behind its numbers is kelvin, and no thousand
    accounts: bool = False  # some of its numbers stand in brackets: these are negative

    def normal(self, text: str) -> str:
        """The text in one case and form, without what does not distinguish it (`bare`)."""
        return folded(self.cased(text), self.turkish)

    def cased(self, text: str) -> str:
        """`normal` in the case that is written."""
        if self.code:
            return " ".join(_TOKEN.findall(plain(text).strip().strip("`").rstrip(";.")))
        return bare(_one_mark(self.signed(text), self.decimal))

    def signed(self, text: str) -> str:
        """The text with a minus in place of an accountant's brackets: (1,200) is -1,200."""
        return _IN_BRACKETS.sub(r"-\1\2\3\4", text) if self.accounts else text

    def same_text(self, reply: str, reference: str) -> bool:
        """Whether both are equal in `normal`; where another reference is too, also in all that tells that one apart."""
        if "```" not in reference or unfenced(reference, anywhere=False) != reference:
            reply, reference = unfenced(reply), unfenced(reference)
        key = self.normal(reference)
        if self.normal(reply) != key:
            led = _LEAD_IN.sub("", reply, count=1)
            led = self._label_of(reply) if led == reply and key in self.labels else led
            return led != reply and self.same_text(led, reference)
        reply, reference = _spaced(reply), _spaced(reference)
        if self._set_apart(reply, reference):
            return False
        others = self.alike.get(key, frozenset()) - {reference}
        if not others:
            return bool(key) or reply == reference
        forms: tuple[Callable[[str], str], ...] = (self.cased, lambda text: folded(text, self.turkish), str)
        form = next(form for form in forms if form(reference) not in {form(other) for other in others})
        return form(reply) == form(reference)

    def _set_apart(self, reply: str, reference: str) -> bool:
        """Whether brackets, or the case of a unit or a formula, tell two texts apart that are equal but for these."""
        matters = self.brackets or self.formulas or _INTERVAL.search(reference)
        one, other = (_BRACKET.findall(text) if matters else [] for text in (reply, reference))
        kinds, others = ({*map(_KINDS.get, some)} for some in (one, other))
        if one and other and (kinds != others or (len(one) == len(other) and one != other)):
            return True
        return case_differs(self.cased(reply).split(), self.cased(reference).split(), formulas=self.formulas)

    def _label_of(self, reply: str) -> str:
        """The label that is the first clause of a reply, where the next one is none: "Yes, because …"; else the reply."""
        clauses = [part for part in _CLAUSE.split(reply) if self.normal(part)]
        known = [self.normal(part) in self.labels for part in clauses[:2]]
        return clauses[0] if known == [True, False] else reply

    def number(self, text: str) -> float | None:
        """The number with which a text answers, a place on the `scale` where there is one; None if there is none."""
        text = self.signed(unfenced(text))
        if self.scale and not self._numbered:
            return self._place(text)
        if self.scale:  # "4 out of 5" is 4
            top = max(self.scale.values())
            text = regex.sub(rf"(?<=\d)\s*\(?(?:/|out of|of|von|sur|de|su)\s*{top}\b(?![.,]?\d)", "", text)
        found = whole_number(text, self.decimal, kelvin=self.kelvin) or self._answering(text)
        if found is None:
            return None
        return found.value / 100 if self.shares and found.unit == "%" else found.value

    def _answering(self, text: str) -> Number | None:
        return answering(text, self.decimal, kelvin=self.kelvin)

    def same_number(self, reply: str, reference: str) -> bool:
        """Whether both answer with the same number, within 1e-6 of it, and in no other unit."""
        left, right = self.number(reply), self.number(reference)
        if left is None or right is None or abs(left - right) > 1e-6 * abs(right):
            return False
        if not self.unit or self.scale:
            return True
        numbers = [self._answering(self.signed(unfenced(text))) for text in (reply, reference)]
        if other_unit(*(one.symbol if one is not None else "" for one in numbers)):
            return False
        found = [one.unit for one in numbers if one is not None]
        symbols = [unit.lstrip("°") or unit for unit in found if unit and (len(unit) <= 3 or not unit.isalpha())]
        return len(symbols) < 2 or symbols[0] == symbols[1]

    @property
    def _numbered(self) -> bool:
        return all(regex.fullmatch(r"-?\d+", label) for label in self.scale)

    def _place(self, text: str) -> float | None:
        """The place of the only label of the scale that a text is, or names as a word."""
        said = self.normal(text)
        if said in self.scale:
            return float(self.scale[said])
        longest_first = sorted(self.scale, key=len, reverse=True)
        named = set(regex.findall("|".join(rf"\b{regex.escape(label)}\b" for label in longest_first), said))
        return float(self.scale[named.pop()]) if len(named) == 1 else None

    def set_of(self, text: str) -> frozenset[str]:
        """The labels of an answer, whatever their order and their separator."""
        parts = self._parts(unfenced(text))
        found = {self.normal(part) for part in parts}
        return frozenset(label for label in found if label)

    def _parts(self, text: str) -> list[str]:
        listed = json_of(text)
        if isinstance(listed, list):
            return [str(item) for item in listed]
        own = "," if self.separator in ("", "[") else self.separator
        found: list[str] = []
        for line in regex.split(rf"[{regex.escape(own)}\n;|]" if own == "," else rf"[{regex.escape(own)}\n]", text):
            part = regex.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line)
            if ":" in part and self.normal(part) not in self.labels:  # "Labels: a"
                part = part.rpartition(":")[2]
            joined = regex.split(r",|\s(?:and|und|et|ve|y|e|&)\s", part)
            known = self.labels and self.normal(part) not in self.labels
            split = known and all(self.normal(each) in self.labels for each in joined if each.strip())
            found += joined if split else [part]
        return found


def _one_mark(text: str, decimal: str) -> str:
    """The text with its numbers by one writing: no groups of thousands, a point before the decimals."""
    if not any(sign.isdigit() for sign in text):
        return text
    text = regex.sub(r"(?<![\w.,])\.(?=\d)", "0.", text)  # .5 is not 5
    text = regex.sub(r"(?<![\p{L}\d.,])(\d[\d.,]*)(?=\p{L})", r"\1 ", text)  # 5mg is 5 mg
    other = "." if decimal == "," else ","
    text = regex.sub(
        rf"(?<![\d.,])\d{{1,3}}(?:\{other}\d{{3}})+(?!\d|[{other}]\d)", lambda found: found[0].replace(other, ""), text
    )
    return regex.sub(r"(?<![\d.,])(\d+),(\d+)(?![\d.,]?\d)", r"\1.\2", text) if decimal == "," else text


def _spaced(text: str) -> str:
    return " ".join(plain(text).split())


def json_of(text: str) -> Any:
    """The value of a JSON text or of its only fenced block; None if it is none, or the value null."""
    try:
        return json.loads(unfenced(text))
    except (ValueError, RecursionError):
        return None


@lru_cache(8)
def conventions_of(references: tuple[str, ...], known: tuple[str, ...] = (), scale: tuple[str, ...] = ()) -> Conventions:
    """How the answers to `references` are read; `known` are answers of training rows, and `scale` ordered labels by setting."""
    within = int(np.searchsorted(np.cumsum([len(text) for text in known[:MOST]]), CHARACTERS)) if known else 0
    every = (*references, *known[:within])
    texts = list(dict.fromkeys(every))
    letters = "".join(texts)
    in_brackets = sum(_IN_BRACKETS.fullmatch(text.strip()) is not None for text in references)
    found = Conventions(
        decimal=decimal_mark(texts),
        code=2 * sum(_CODE.search(text) is not None for text in references) >= len(references),
        formulas=are_formulas([plain(text) for text in references], NEARLY_ALL),
        kelvin=in_kelvin(references, NEARLY_ALL),
        accounts=0 < in_brackets < len(references),
    )
    if any(sign in letters for sign in DOTLESS):
        small = (word for text in texts for word in words(text) if "I" not in word)
        found = replace(found, turkish=frozenset(folded(word) for word in small))
    alike: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        alike[found.normal(unfenced(text))].add(_spaced(unfenced(text)))
    kinds = any(len({form.translate(_ONE_KIND) for form in forms}) < len(forms) for forms in alike.values())
    found = replace(found, brackets=kinds, alike={key: frozenset(forms) for key, forms in alike.items() if len(forms) > 1})
    kind = _declared(found, references, scale) or _json_or_sets(found, references, every) or _numbers(found, references, every)
    if kind is not None:
        return kind
    short = np.median([len(words(text)) for text in references]) <= SHORT
    labels = {found.normal(text) for text in every}
    few = len(every) >= TIMES_A_LABEL * len(labels) and max(len(label.split()) for label in labels) <= LABEL_WORDS
    return replace(
        found,
        kind="short texts" if short else "texts",
        labels=frozenset(labels if few else ()),
        why=f"as {'short ' if short else ''}texts{', equal but for case and punctuation' if short else ''}",
    )


def _declared(found: Conventions, references: tuple[str, ...], scale: tuple[str, ...]) -> Conventions | None:
    """A scale by setting, if all references are on it."""
    places = {found.normal(label): place for place, label in enumerate(scale)}
    if not scale or any(found.normal(text) not in places for text in references):
        return None
    said = f"as labels in the order {', '.join(scale)} (evaluate.scale)"
    return replace(found, kind="ordered labels", why=said, scale=places, range=len(scale) - 1.0, middle=(len(scale) - 1) / 2)


def _json_or_sets(found: Conventions, references: tuple[str, ...], every: tuple[str, ...]) -> Conventions | None:
    values = [json_of(text) for text in references]
    if all(isinstance(value, list) and all(isinstance(item, str) for item in value) for value in values):
        sets = _sets(found, every, "[", [json_of(text) or [] for text in every])
        if sets is not None:
            return sets
    if sum(isinstance(value, (dict, list)) for value in values) >= NEARLY_ALL * len(values):
        return replace(found, kind="JSON", why="as JSON of equal value")
    for separator in SEPARATORS:
        if sum(separator in text for text in references) < SEVERAL * len(references):
            continue
        sets = _sets(found, every, separator, [text.strip().split(separator) for text in every])
        if sets is not None:
            return sets
    return None


def _sets(found: Conventions, every: Sequence[str], separator: str, parts: Sequence[Sequence[Any]]) -> Conventions | None:
    """Sets, if few short labels recur, none twice in an answer, and hardly ever in another order."""
    listed = [[found.normal(str(part)) for part in some] for some in parts]
    counts = Counter(label for some in listed for label in some)
    if not counts or counts.total() < TIMES_A_LABEL * len(counts) or any(not label for label in counts):
        return None
    if any(len(label.split()) > LABEL_WORDS for label in counts) or any(len(set(some)) < len(some) for some in listed):
        return None
    if all(regex.fullmatch(r"[-+]?[\d. ]+", label) for label in counts):  # coordinates, or a decimal comma
        return None
    if sum(len(some) > 1 for some in listed) < SEVERAL * len(every) or len({frozenset(some) for some in listed}) < 3:
        return None
    orders = Counter(pair for some in listed for pair in combinations(some, 2))
    rarer = sum(min(count, orders[right, left]) for (left, right), count in orders.items()) / 2
    if rarer > EITHER_ORDER * orders.total():
        return None
    name = {"\n": "lines", "[": "JSON lists"}.get(separator, f"'{separator}'")
    why = f"as sets of labels, whatever their order: {len(counts)} labels, by {name}"
    return replace(found, kind="sets of labels", why=why, separator=separator, labels=frozenset(counts))


def scale_of_labels(labels: Sequence[str], scale: tuple[str, ...] = ()) -> list[int] | None:
    """The places of a file's labels on a scale: by setting, or as whole numbers in a row; None if they have no order."""
    if scale:
        places = {folded(bare(label)): place for place, label in enumerate(scale)}
        found = [places.get(folded(bare(label))) for label in labels]
        return None if None in found else [place for place in found if place is not None]
    numbers = [one for label in labels if (one := whole_number(label, ".")) is not None]
    units = {one.unit.removesuffix("s") for one in numbers}
    if len(numbers) < len(labels) or len(units) > 1:
        return None
    if not _whole_scale(np.unique([one.value for one in numbers]), "".join(units)):
        return None
    return [int(one.value) for one in numbers]


def _whole_scale(levels: Floats, unit: str) -> dict[str, int]:
    """The places of whole numbers that are a scale: in a row, with a unit, or from 1 to 5 or more, or around 0.

    Others, such as 0 to 3, may be codes of labels without an order.
    """
    few = 3 <= len(levels) <= MOST_LEVELS and bool((levels == np.round(levels)).all())
    if not few or len(levels) != np.ptp(levels) + 1:
        return {}
    ordered = unit or (levels[0] == 1 and len(levels) >= 5) or levels[0] == -levels[-1]
    return {f"{level:.0f}": int(level) for level in levels} if ordered else {}


def _numbers(found: Conventions, references: tuple[str, ...], every: tuple[str, ...]) -> Conventions | None:
    """Numbers, if nearly all references are some, in one unit; whole ones of few values in a row, often, are a scale."""

    def number(text: str) -> Number | None:
        text = found.signed(text)
        whole = whole_number(text, found.decimal, kelvin=found.kelvin)
        return found._answering(text) if whole is None and _MARKED.search(text) else whole

    some = [one for text in references if (one := number(text)) is not None]
    units = {one.unit.removesuffix("s") for one in some if one.unit}
    symbols = {one.symbol for one in some}
    mixed = len(units) > 1 or any(other_unit(one, other) for one, other in combinations(symbols, 2))
    if mixed or len(some) < NEARLY_ALL * len(references):
        return None
    values = np.array([one.value for text in every if (one := number(text)) is not None])
    levels, counts = np.unique(values, return_counts=True)
    decimals = sum("/" not in text and (one := number(text)) is not None and one.value % 1 != 0 for text in references)
    found = replace(
        found,
        kind="numbers",
        range=float(np.ptp(values)) or 1.0,
        middle=float(np.median(values)),
        unit="".join(units),
        measured=decimals >= len(references) / 2,
        shares="%" not in units and bool((abs(values) <= 1).all()),
    )
    places = _whole_scale(levels, found.unit)
    if places and counts.sum() >= ROWS_A_LEVEL * len(levels) and not any(_MARKED.search(text) for text in references):
        return replace(found, kind="ordered labels", scale=places, why=f"as a scale from {levels[0]:.0f} to {levels[-1]:.0f}")
    unit = f", unit '{found.unit}'" if found.unit else ""
    mark = f", decimal mark '{found.decimal}'" if any(set(",.") & set(text) for text in references) else ""
    return replace(found, why=f"as numbers{mark}{unit}")
