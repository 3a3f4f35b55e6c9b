"""Numbers as people write them: decimal marks, groups of thousands, signs, currencies, percent, and the one that answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import regex

from lorakeet.evaluate.reading.texts import plain

UNITS = {
    **dict.fromkeys(("percent", "prozent", "procent", "pct"), "%"), **dict.fromkeys(("eur", "euro", "euros"), "€"),
    **dict.fromkeys(("usd", "us$", "dollar", "dollars"), "$"), "gbp": "£", "jpy": "¥", "try": "₺", "inr": "₹", "kelvin": "k",
}  # fmt: skip
TIMES = {
    **dict.fromkeys(("k", "thousand", "tausend", "mille", "bin"), 1e3),
    **dict.fromkeys(("million", "millions", "mio", "millionen", "milyon", "millones"), 1e6),
    **dict.fromkeys(("billion", "billions", "bn", "mrd", "milliarde", "milliarden", "milliard", "milliards", "milyar"), 1e9),
}  # fmt: skip
LARGEST = 1e100  # larger ones are none: their differences would overflow
_CURRENCY = r"(?:[A-Z]{1,2})?\p{Sc}"  # HK$ is not $
_SPACE = r"[ \u00a0\u2009\u202f'’]"
_FRACTION = r"(?:\d{1,9} )?(?<!/)\d{1,15} ?/ ?[1-9]\d{0,14}(?![\d/])"  # 3/4 or 1 1/2, and no date
_DIGITS = rf"{_FRACTION}|\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)(?:[.,]\d+)?|\d(?:[\d.,]*\d)?|[.,]\d+"
_NUMBER = regex.compile(
    rf"(?<![\p{{L}}\p{{N}}_)\]]|\d[.,])(?P<sign>[-+](?=[\d.,]|{_CURRENCY}))?"
    rf"(?P<money>{_CURRENCY}|(?<!\p{{L}})[A-Z]{{3}}(?=[ ]?[\d-]))?[ ]?(?P<inner>-(?=\d))?(?<!\d)(?P<digits>{_DIGITS})"
    rf"(?:[eE](?P<e>[-+]?[0-9]{{1,3}}(?![0-9]))|[ ]?[×x*·][ ]?10(?:\^|\*\*)(?P<ten>[-+]?[0-9]{{1,3}}(?![0-9])))?"
    rf"(?:[ ]?(?P<unit>[%‰]|°?\p{{L}}+(?:/\p{{L}}+)?|{_CURRENCY}|°))?"
)
_MINUS = regex.compile(r"\b(?:minus|negative|moins|menos|eksi)\s+(?=[\d.,])", regex.I)
_GROUPS = regex.compile(r"\d{1,3}(?:([.,])\d{3})(?:\1\d{3})*")
_IS = r"(?:is|are|was|equals|ist|sind|lautet|beträgt|est|es|è|:|=)"
_ANSWER = regex.compile(
    r"\b(?:answer|result|total|solution|antwort|ergebnis|lösung|réponse|résultat|respuesta|resultado|risposta|risultato|cevap|"
    rf"sonuç|yanıt|ответ)\b[^.\d\n=]{{0,40}}?(?:{_IS}|\n)|答案是?|答え",
    regex.I,
)
_BOLD = regex.compile(r"(?<!\*)\*\*(?=[^\w*]*\d[\d.,\s]*[^\d*\n]{0,12}\*\*)")  # a number, maybe with its unit
_MARKERS = (regex.compile(r"####"), regex.compile(r"\\boxed\s*\{"), _ANSWER, _BOLD)
_EQUALS = regex.compile(r"[=≈]")
_ABOUT = r"(?:about|around|approximately|exactly|only|etwa|rund|genau|environ)"
_COPULA = regex.compile(rf"\b{_IS}\s+{_ABOUT}?\s*(?=\W{{0,3}}\d)", regex.I)
_REFERRED = regex.compile(
    r"\([^()]*\)|\[[^\[\]]*\]|(?:±|\bout of)\s*\d[\d.,]*|"
    r"\b(?:pages?|pp?\.|steps?|sections?|chapters?|lines?|rows?|figures?|fig\.|tables?|notes?|seite|"
    r"schritt|kapitel|zeile|sayfa|página|pagina)\s*\d+(?:\s?[-–]\s?\d+)?|"
    r"\b(?:not|rather than|instead of|nicht|statt|au lieu de|pas)\s+\d[\d.,]*",
    regex.I,
)


@dataclass(frozen=True)
class Number:
    """A number of a text, where it stands, its unit (the currency, % or word at it), as written if it is a measure."""

    value: float
    start: int
    end: int
    unit: str
    symbol: str = ""


def decimal_mark(texts: Iterable[str]) -> str:
    """The decimal mark of a file: "," or "." by what its numbers can only mean; "." where they do not say."""
    votes = {".": 0, ",": 0}
    other = {".": ",", ",": "."}
    for text in texts:
        for digits in (found["digits"] for found in _NUMBER.finditer(plain(text))):
            marks = [sign for sign in digits if sign in ".,"]
            if len(set(marks)) == 2 and marks.count(marks[-1]) == 1:
                votes[marks[-1]] += 1
            elif len(set(marks)) == 1 and _GROUPS.fullmatch(digits):
                votes[other[marks[0]]] += len(marks) > 1  # 1.234.567; 1.234 may mean either
            elif len(marks) == 1:
                votes[marks[0]] += 1
    return "," if votes[","] > votes["."] else "."


def in_kelvin(texts: Sequence[str], share: float) -> bool:
    """Whether K is kelvin: one stands behind a space in so many of the texts, and no number has a currency or is scaled."""
    spaced = 0
    for text in map(plain, texts):
        kelvin = 0
        for found in _NUMBER.finditer(text):
            unit = found["unit"] or ""
            if found["money"] or unit.casefold() in TIMES:
                if found["money"] or unit != "K" or text[found.start("unit") - 1] != " ":
                    return False
                kelvin += 1
        spaced += kelvin == 1
    return spaced >= share * len(texts)


def numbers_in(text: str, decimal: str, *, kelvin: bool = False) -> Iterator[Number]:
    """The numbers of a text in `plain` form. A date or a version, such as 1.12.2024, is none; "1,2,3" are three, 1 1/2 is one.

    K is a thousand, or a `kelvin`.
    """
    for found in _NUMBER.finditer(text):
        sign = -1 if "-" in ((found["sign"] or "") + (found["inner"] or "")) else 1
        power = int(found["e"] or found["ten"] or 0)
        symbol = found["unit"] or ""
        behind = "kelvin" if kelvin and symbol in ("K", "k") else symbol.casefold()
        times = TIMES.get(behind, 1e6 if found["money"] and behind == "m" else 1.0)  # "$5m", but 5 m
        unit = (found["money"] or ("" if times > 1 else behind)).strip().casefold()
        unit = UNITS.get(unit, unit)
        for value in _values(found["digits"], decimal):
            scaled = times * (float(f"{value!r}e{power}") if power and value < LARGEST else value)
            if scaled < LARGEST:
                yield Number(sign * scaled, found.start(), found.end(), unit, "" if found["money"] or times > 1 else symbol)
                sign = 1


def _values(digits: str, decimal: str) -> list[float]:
    if "/" in digits and digits.isascii():
        *whole, above, below = map(int, regex.findall(r"\d+", digits))
        return [sum(whole) + above / below]
    digits = regex.sub(_SPACE, "", digits)
    if not digits.isascii():  # of a script that `plain` does not know
        return []
    marks = [sign for sign in digits if sign in ".,"]
    if len(set(marks)) == 2:
        last = marks[-1]
        head, tail = digits.rsplit(last, 1)
        if last in head:
            return []
        return [float(f"{head.replace(',', '').replace('.', '')}.{tail}")]
    if len(marks) > 1:
        if _GROUPS.fullmatch(digits):
            return [float(digits.replace(marks[0], ""))]
        return [float(part) for part in digits.split(",") if part] if marks[0] == "," else []
    if marks and marks[0] != decimal and _GROUPS.fullmatch(digits) and not digits.startswith("0"):
        return [float(digits.replace(marks[0], ""))]
    return [float(digits.replace(",", "."))]


def whole_number(text: str, decimal: str, *, kelvin: bool = False) -> Number | None:
    """The number that a text consists of, with its unit; None if there is more in it, or a code such as 007."""
    text = _MINUS.sub("-", plain(text).strip().strip("*`").rstrip(".").strip())
    found = _NUMBER.fullmatch(text)
    parts = list(numbers_in(text, decimal, kelvin=kelvin)) if found else []
    zeros = found is not None and regex.match(r"0\d", found["digits"])
    return parts[0] if len(parts) == 1 and not zeros else None


def answering(text: str, decimal: str, *, kelvin: bool = False) -> Number | None:
    """The number with which a text answers.

    That of the last "####", box, "the answer is" or bold type; else the one behind the last =, the one the text starts with, the
    one behind the verb of a single sentence; else the last, not in brackets and not of a page or a step.
    """
    text = _MINUS.sub("-", plain(text).strip())
    found = list(numbers_in(text, decimal, kelvin=kelvin))
    if not found:
        return None
    referred = [at.span() for at in _REFERRED.finditer(text)]
    outside = [one for one in found if not any(start <= one.start < end for start, end in referred)]
    for marker in _MARKERS:
        for at in reversed(list(marker.finditer(text))):
            end = text.find("\n", text.find(next(iter(text[at.end() :].split()), ""), at.end()))
            line = [one for one in outside or found if at.end() <= one.start and (end < 0 or one.start < end)]
            if line:
                return _behind(_EQUALS, text, line) or line[0]
    first = found[0]
    starts = not text[: first.start].strip(" *`~≈") and regex.match(r"\s*(?:$|[\n(\[,;.*—–])", text[first.end :])
    one_sentence = not regex.search(r"[.!?]\s+\S|\n", text)
    ranges = {one.start for one in outside if regex.match(r"\s?[-–]\s?\d", text[one.end :])}
    copula = _behind(_COPULA, text, [one for one in outside if one.start not in ranges]) if one_sentence else None
    return _behind(_EQUALS, text, found) or (first if starts else copula or (outside or found)[-1])


def _behind(sign: regex.Pattern[str], text: str, found: list[Number]) -> Number | None:
    """The number right behind the last such sign that has one."""
    for at in reversed(list(sign.finditer(text))):
        for one in found:
            if one.start >= at.end() and not text[at.end() : one.start].strip(" *$\\{("):
                return one
    return None
