"""Where the case of letters carries meaning: units (MW and mW) and chemical formulas (CO and Co)."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from lorakeet.evaluate.reading.numbers import UNITS

_SI, _SMALL, _LARGE = tuple("fpnμumcdhkMGT"), tuple("fpnμum"), tuple("MGT")
_UNITS = {
    **dict.fromkeys("m g s A K J W C V F S Ω L l H".replace(" ", ""), _SI),
    **dict.fromkeys(("Hz", "N", "Pa", "Wh", "VA", "eV", "Bq", "Gy", "Sv", "mol", "bar"), _SI),
    "T": _SMALL, "M": _SMALL, "t": ("k", "M", "G"), "Nm": ("m", "k", "M"), "B": ("k", "K", *_LARGE), "b": _LARGE,
}  # fmt: skip
_SAME = {"u": "μ", "K": "k"}  # prefixes
_MEANING = {
    prefix + unit: (_SAME.get(prefix, prefix), "L" if unit == "l" else unit)
    for unit, prefixes in _UNITS.items()
    for prefix in (*prefixes, *([] if unit == "H" else [""]))  # 24H are hours
}
_ELEMENTS = (
    "He|Li|Be|Ne|Na|Mg|Al|Si|Cl|Ar|Ca|Sc|Ti|Cr|Mn|Fe|Co|Ni|Cu|Zn|Ga|Ge|As|Se|Br|Kr|Rb|Sr|Zr|Nb|Mo|Tc|Ru|Rh|Pd|Ag|Cd|In|Sn|Sb|Te|"
    "Xe|Cs|Ba|La|Ce|Pr|Nd|Pm|Sm|Eu|Gd|Tb|Dy|Ho|Er|Tm|Yb|Lu|Hf|Ta|Re|Os|Ir|Pt|Au|Hg|Tl|Pb|Bi|Po|At|Rn|Fr|Ra|Ac|Th|Pa|Np|Pu|Am|"
    "No|H|B|C|N|O|F|P|S|K|V|Y|I|W|U"
)
_FORMULA = regex.compile(rf"(?:[(\[]|(?:{_ELEMENTS}|[)\]])\d*)++(?:·\d*(?:(?:{_ELEMENTS})\d*)++)?")
_CHARGE = regex.compile(r"(?:\^?\d?[-+]|\((?:s|l|g|aq)\))*$")
_WORD = regex.compile(r"(\p{L}+)(\d*)")
_OF_NUMBER = regex.compile(r"[-+]?[\d.,]+")
_CURRENCY = regex.compile(r"\p{Sc}\W*$")
_FEWEST_FORMULAS = 3


def other_unit(one: str, other: str) -> bool:
    """Whether two units both exist as written and differ: MW and mW, but neither KG and kg nor two letters such as M and m."""
    pairs = zip(one.split("/"), other.split("/"), strict=False)
    found = [(_MEANING.get(left), _MEANING.get(right)) for left, right in pairs if len(left + right) > 2]  # 5M may be millions
    return any(left is not None and right is not None and left != right for left, right in found)


def is_formula(text: str) -> bool:
    """Whether a text may be a chemical formula, with its charge."""
    return _FORMULA.fullmatch(_CHARGE.sub("", text.strip())) is not None


def are_formulas(texts: Sequence[str], share: float) -> bool:
    """Whether so many of the texts are formulas, at least three of them different ones, and some of more than one letter."""
    found = [text for text in texts if is_formula(text)]
    longer = {text for text in found if sum(map(str.isupper, text)) > 1 or any(map(str.isdigit, text))}
    return len(found) >= share * len(texts) and len({*found}) >= _FEWEST_FORMULAS and bool(longer)


def case_differs(one: Sequence[str], other: Sequence[str], *, formulas: bool) -> bool:
    """Whether two texts, as words that are equal but for case, have another unit behind a number, or another formula."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            words = [_WORD.fullmatch(word) for word in (left, right)]
            units = [found[1] if found else "" for found in words]
            before = one[place - 1] if place else ""
            measured = before == "/" or (before[-1:].isdigit() and not _is_money(one[:place]))
            if measured and other_unit(*units):
                return True
            if formulas and is_formula(left) and is_formula(right):
                return True
    return False


def _is_money(words: Sequence[str]) -> bool:
    """Whether words that end in a number have a currency before it."""
    number = len(words)
    while number and _OF_NUMBER.fullmatch(words[number - 1]):
        number -= 1
    before = words[number - 1] if number else ""
    return before.casefold() in UNITS or _CURRENCY.search(before) is not None
