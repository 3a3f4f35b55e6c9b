"""How answers are read, by the references of a file: signs, case, fences, numbers, sets, scales."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.evaluate.reading.conventions import Conventions, Kind, conventions_of, scale_of_labels
from lorakeet.evaluate.replies import absolute_error, json_match, main_metric, normalised_match, numeric_match, set_f1, valid_json

SQL = ("SELECT a FROM t WHERE a != b", "SELECT a FROM t WHERE a == b", "SELECT a FROM t WHERE a <= 5")
GENRES = ("action, comedy", "comedy", "action, drama", "drama, horror", "action, comedy, drama", "comedy, horror") * 3


def read(*references: str, known: tuple[str, ...] = ()) -> Conventions:
    return conventions_of(references, known)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (">50K", "<=50K"), ("A+", "A-"), ("C++", "C"), ("C#", "C"), ("a != b", "a == b"), ("a != b", "a = b"), ("<5", ">5"),
        ("x >= 1", "x > 1"), ("5%", "5"), ("$5", "€5"), ("-5", "5"), ("Cu2+", "Cu2-"), ("Na+", "Na"), ("a & b", "a | b"),
        ("3.5", "35"), ("3 + 4", "3 - 4"), ("10²", "102"), ("1½", "11/2"), ("@home", "home"), ("a/b", "a b"), ("x_1", "x 1"),
        ('5"', "5'"), ("5′", "5"), ("5 MW", "5 mW"), ("it takes 3 Mg/L", "it takes 3 mg/L"), ("7 mS", "7 MS"), ("2 Nm", "2 nm"),
        ("9 GB", "9 Gb"), ("4 mM", "4 mm"), ("x in [0, 1)", "x in (0, 1]"), ("[0, 1]", "(0, 1)"),
        ("6'2\"", "62"),
        ("p := 1", "p = 1"), ("i++", "i--"), ("~x", "x"), ("(-)", "(+)"), (":)", ":("), ("2*3", "2 3"), ("#ff0000", "ff0000"),
    ],
)  # fmt: skip
def test_signs_that_carry_meaning_are_kept(one: str, other: str) -> None:
    """The first eleven scored 1.0 against each other: the sign was dropped. The other need not be among the references."""
    for file in (read(one), read(other), read(one, other)):
        assert normalised_match(other, one, file) == normalised_match(one, other, file) == 0.0
        assert normalised_match(one, one, file) == 1.0


@pytest.mark.parametrize(
    ("reply", "reference"),
    [
        ("Paris.", "Paris"), ("**Paris**", "paris"), ('"Paris"', "Paris"), ("- Paris", "Paris"), ("`C++`.", "C++"),
        ("(A+)", "A+"),        ("−5", "-5"), ("Ｃ＋＋", "C++"), ("H₂O", "H2O"), ("5 km²", "5 km2"), ("STRASSE", "straße"),
        ("Cafe\u0301", "café"),
        ("```sql\nSELECT a\n```", "SELECT a"), ("Here it is:\n```\nSELECT a\n```\nDone.", "SELECT a"), ("3,000 kg", "3000 kg"),
        ("well known", "well-known"), ("答案是甲。", "答案是甲"), (">50k!", ">50K"), ("# Paris", "Paris"),
        ("5 KG", "5 kg"), ("5 ml", "5 mL"), ("5 KB", "5 kB"), ("24H", "24h"), ("5''", '5"'), ("6′ 2″", "6'2\""), ('"5"', "5"),
        ("'route 5'", "route 5"), ('The "5" key', "the 5 key"), ("a) Paris", "(a) Paris"), ("(Paris)", "Paris"),
        ("$5m", "$5M"), ("$5b", "$5B"), ("5m", "5M"), ("It lost $3b then", "It lost $3B then"), ("THE 90S", "the 90s"),
        ("in the 1980S", "in the 1980s"), ("IT WEIGHS 5 T", "It weighs 5 t"), ("Washington [DC]", "Washington (DC)"),
        ('{"a":"5"}', '{"a": "5"}'), ('["1","2"]', '["1", "2"]'), ('Born:"1990"', 'Born: "1990"'), ('x="5"', 'x = "5"'),
        ('("5","","6.5")', '("5", "", "6.5")'), ("x='5'", "x = '5'"), ("50 K", "50K"),
        ("MM wave", "mm wave"), ("NO", "no"), ("1'234'567 x", "1'234'567 X"),
        ("The answer is: **Paris**.", "Paris"), ("Antwort: A+", "A+"), ("don’t", "don't"),
    ],
)  # fmt: skip
def test_what_a_person_does_not_see_as_another_answer_is_none(reply: str, reference: str) -> None:
    assert normalised_match(reply, reference, read(reference, "unlike")) == 1.0


@pytest.mark.parametrize(
    ("one", "other"), [("CO", "Co"), ("US", "us"), ("Yes!", "Yes?"), ("a b", "(a) b"), ("f[x]", "f(x)"), ("m:s", "m.s")]
)
def test_what_tells_two_references_of_the_file_apart_counts(one: str, other: str) -> None:
    file = read(one, other, "third", "Third one")
    assert normalised_match(one, other, file) == normalised_match(other, one, file) == 0.0
    assert normalised_match(one, one, file) == normalised_match(other, other, file) == 1.0
    assert normalised_match("THIRD", "third", file) == 1.0  # what distinguishes others is not asked of this one


@given(st.lists(st.text(alphabet="aAbB+-<>=! .,", min_size=1, max_size=5).map(str.strip), min_size=2, max_size=8))
def test_no_reference_matches_another_one(references: list[str]) -> None:
    """Whatever the references are: two that differ in more than white space are never the same answer."""
    file = read(*references)
    for one in references:
        for other in references:
            assert normalised_match(one, other, file) == float(one.split() == other.split())


ODD = (  # references, reply, reference, and whether a person would call it the answer
    (("$5", "$12"), "5 dollars", "$5", 1), (("$5", "$12"), "€5", "$5", 0), (("$5", "$12"), "$5.00", "$5", 1),
    (("$1.2 million", "$3 million"), "$1,200,000", "$1.2 million", 1), (("$5m", "$7m"), "$5 million", "$5m", 1),
    (("5 m", "7 m"), "5000000", "5 m", 0), (("5k", "7k"), "5000", "5k", 1), (("2 Mrd", "3 Mrd"), "2 000 000 000", "2 Mrd", 1),
    (("-5", "7"), "minus 5", "-5", 1), (("-5", "7"), "5", "-5", 0), (("-5", "7"), "It is negative 5", "-5", 1),
    (("1/2", "3/4"), "0.5", "1/2", 1), (("1/2", "3/4"), "½", "1/2", 1), (("1/2", "3/4"), "2", "1/2", 0),
    (("0.5", "0.75"), "1/2", "0.5", 1), (("5-10", "10-20"), "5–10", "5-10", 1), (("5-10", "10-20"), "5", "5-10", 0),
    (("2024-01-02", "2023-05-06"), "2024-01-02.", "2024-01-02", 1), (("12%", "15%"), "12 percent", "12%", 1),
    (("≥ 3", "< 3"), ">= 3", "≥ 3", 1), (("≥ 3", "< 3"), "≤ 3", "≥ 3", 0), (("≥ 3", "< 3"), "3", "≥ 3", 0),
    (("Fe2+", "Fe3+"), "Fe^{2+}", "Fe2+", 1), (("Fe2+", "Fe3+"), "Fe²⁺", "Fe2+", 1), (("Fe2+", "Fe3+"), "Fe3+", "Fe2+", 0),
    (("x^2", "x"), "x²", "x^2", 1), (("10^2 + y", "102 + y"), "102 + y", "10^2 + y", 0), (("❤️", "💔"), "❤", "❤️", 1),
    (("👍", "👎"), "👎", "👍", 0), (("C#", "C", "C++"), "C", "C#", 0), (("C#", "C", "C++"), "C++, since it compiles", "C++", 1),
    (("yes", "no"), "Yes, because the sky is blue.", "yes", 1), (("yes", "no"), "No, yes would be wrong", "no", 1),
    (("yes", "no"), "**Yes** - it does", "yes", 1), (("yes", "no"), "yes, no", "yes", 0),
    (("yes", "no"), "Yesterday, it was", "yes", 0),
    (("A", "B", "C"), "A) Paris", "A", 1), (("A", "B", "C"), "Option B.", "B", 1), (("A", "B", "C"), "A or B", "A", 0),
    (("İstanbul", "Ankara"), "ISTANBUL", "İstanbul", 1), (("12", "7"), "١٢", "12", 1), (("12", "7"), "12 or 13", "12", 0),
    (("true", "false"), "```\ntrue\n```", "true", 1), (("3:30", "15:45"), "3:30 pm", "3:30", 0),
)  # fmt: skip


@pytest.mark.parametrize(("references", "reply", "reference", "right"), ODD)
def test_odd_answers_are_read_as_a_person_reads_them(references: tuple[str, ...], reply: str, reference: str, right: int) -> None:
    """17 of these 44 were read otherwise: words for signs and powers of ten, fractions, marks, labels with reasons."""
    file = read(*references * 4)
    metric = numeric_match if file.kind == "numbers" else normalised_match
    assert metric(reply, reference, file) == right, file.why


FORMULAS = ("CO", "H2O", "NaCl", "Fe2O3", "SO4^2-", "Ca(OH)2", "CuSO4·5H2O")


def test_case_tells_formulas_apart_where_the_references_are_some() -> None:
    file = read(*FORMULAS)
    assert [normalised_match(reply, "CO", file) for reply in ("CO", "Co", "co", "CO.")] == [1.0, 0.0, 1.0, 1.0]
    for labels in (("No", "Yes"), ("B", "C", "F"), ("CO", "NY", "TX")):  # which may be formulas too
        assert normalised_match(labels[0].swapcase(), labels[0], read(*labels)) == 1.0


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("unit", ["ms", "mS", "MS", "Ms", "mg", "Mg", "MG", "nm", "Nm", "nM", "Pa", "pA", "kg"])
def test_a_unit_that_case_makes_another_is_not_equal(unit: str, alone: bool) -> None:
    """Alone in a file its numbers have one unit; beside another the unit is a part of the answer."""
    one, other = f"5 {unit}", f"5 {unit.swapcase()}"
    file = read(*([one] if alone else [one, "5 MW", "5 mW"]))
    same = numeric_match if file.kind == "numbers" else normalised_match
    assert file.kind == ("numbers" if alone else "short texts") and same(one, one, file) == 1.0
    assert same(other, one, file) == float(unit in ("Mg", "mg", "MG", "nm", "kg"))


def test_kelvin_is_no_thousand() -> None:
    file = read("300 K", "77 K")
    replies = ("300", "300 kelvin", "300 K", "300,000", "300 °C")
    assert [numeric_match(reply, "300 K", file) for reply in replies] == [1, 1, 1, 0, 0]
    assert numeric_match("5000", "5k", read("5k", "7K")) == 1.0 and read("5 ms", "7 m").kind == "short texts"


@pytest.mark.parametrize(
    ("references", "replies", "wrong"),
    [
        (("50K", "7K"), ("50 K", "50k", "50,000"), "50"),
        (("50 K", "7k"), ("50K", "50k", "50,000"), "50"),  # one is scaled
        (("$50 K", "$7 K"), ("$50K", "50,000"), "50"),
        (("50 K", "77 K"), ("50K", "50k", "50", "50 kelvin"), "50,000"),  # all are in kelvin
        (("$5M", "$7m"), ("$5m", "5 million"), "5"),
        (("$5B", "$7b"), ("$5b",), "$6b"),
    ],
)
def test_a_letter_behind_a_number_is_read_as_the_references_have_it(
    references: tuple[str, ...], replies: tuple[str, ...], wrong: str
) -> None:
    file = read(*references)
    assert file.kind == "numbers" and numeric_match(wrong, references[0], file) == 0.0
    assert [numeric_match(reply, references[0], file) for reply in replies] == [1.0] * len(replies)


def test_the_kind_of_brackets_counts_where_it_tells_references_apart() -> None:
    assert normalised_match("Rome [IT]", "Rome (IT)", read("Rome (IT)", "(a) b", "[a] b")) == 0.0
    assert normalised_match("Rome [IT]", "Rome (IT)", read("Rome (IT)", "(a) b", "a b")) == 1.0
    assert normalised_match("[abc]", "(abc)", read("[abc]", "(abc)")) == 0.0


def test_the_sides_of_a_query_are_told_apart() -> None:
    file = read(*SQL)
    assert [[normalised_match(one, other, file) for one in SQL] for other in SQL] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert normalised_match("select a from t where a <= 5;", SQL[2], file) == 1.0


def test_the_turkish_i_is_folded_as_the_file_has_it() -> None:
    turkish = read("ısparta", "İzmir", "kır", "kir", "info")
    assert normalised_match("ISPARTA", "ısparta", turkish) == normalised_match("izmir", "İzmir", turkish) == 1.0
    assert normalised_match("KIR", "kır", turkish) == 1.0 and normalised_match("KIR", "kir", turkish) == 0.0
    assert normalised_match("KİR", "kir", turkish) == 1.0 and normalised_match("INFO", "info", turkish) == 1.0
    english = read("info", "Istanbul")
    assert normalised_match("INFO", "info", english) == normalised_match("İstanbul", "Istanbul", english) == 1.0


def test_a_fenced_block_is_its_content() -> None:
    fenced = 'Here you are:\n```json\n{"a": 1}\n```'
    assert json_match(fenced, '{"a": 1}') == valid_json(fenced, "{}") == 1.0
    assert json_match(fenced, '{"a": true}') == 0.0 and valid_json("```json\n{\n```", "{}") == 0.0
    assert json_match('```\n{"a": 2}\n```', '```json\n{"a":2}\n```') == 1.0


@pytest.mark.parametrize(
    ("references", "reply", "value"),
    [
        (("1,5", "2,25"), "1.5", 1.5), (("1.5", "2.25"), "1,5", 1.5), (("1,5", "2,25"), "1.234", 1234), (("1.5",), "1,234", 1234),
        (("1.5",), "1.234", 1.234), (("7",), "1.234,5", 1234.5), (("7",), "1,234.5", 1234.5), (("7",), "1 234", 1234),
        (("7",), "1\u202f234,50 €", 1234.5), (("7",), "12 (page 3)", 12), (("7",), "12%", 12), (("0.5", "0.12"), "12%", 0.12),
        (("7",), "The answer is 12 (page 3).", 12), (("7",), "3 + 4 = 7, as on page 12", 7),
        (("7",), "#### 12\n\nStep 3 done", 12),
        (("7",), r"So $\boxed{12}$, by step 3", 12), (("7",), "**12** since 5 + 7", 12), (("7",), "−3", -3), (("7",), "-$5", -5),
        (("7",), "$-5.50", -5.5), (("7",), "1.5e3", 1500), (("7",), "1.5 × 10³", 1500), (("7",), "USD 1,200", 1200),
        (("7",), "5 apples and 7 more make 12", 12), (("7",), "There are 12 people, 5 more than before", 12),
        (("7",), "3/4", 0.75),
        (("7",), "Die Antwort lautet 12 (Seite 3)", 12), (("7",), "Cevap: 12, sayfa 3", 12),
        (("7",), "La réponse est 1 234,5", 1234.5),
        (("7",), "Answer: 5 + 7 = 12", 12), (("7",), "The total of 5 and 7 is 12", 12), (("7",), "```\n12\n```", 12),
        (("7",), "1'234.5", 1234.5), (("7",), "I counted 12 of them on page 3", 12), (("7",), "12, because 5 + 7", 12),
        (("7",), "It is 12, not 17", 12), (("7",), "The answer is not 17 but 12", 12), (("7",), "12 percent", 12),
        (("7",), "12 it is; see pages 3-5", 12),
        (("7",), "on 12.03.2024", None), (("7",), "none", None), (("7",), "12.", 12), (("7",), "1.234.567", 1234567),
    ],
)  # fmt: skip
def test_the_number_that_answers_is_read(references: tuple[str, ...], reply: str, value: float | None) -> None:
    assert read(*references).number(reply) == (None if value is None else pytest.approx(value))


def test_another_unit_is_another_answer() -> None:
    weights = read("12 kg", "3 kg", "1,5 kg")
    assert weights.kind == "numbers" and weights.unit == "kg" and weights.decimal == ","
    assert numeric_match("12 g", "12 kg", weights) == 0.0
    prices = read("€12.50", "€3.99")
    assert numeric_match("EUR 12,50", "€12.50", prices) == 1.0 and numeric_match("$12.50", "€12.50", prices) == 0.0
    assert numeric_match("12", "12 kg", weights) == numeric_match("12 kg (S. 3)", "12 kg", weights) == 1.0


@pytest.mark.parametrize(
    ("references", "kind", "metric"),
    [
        (('{"a": 1}', "[2]"), "JSON", "json_match"),
        (("12", "-3.5", "$4,000"), "numbers", "numeric_match"),
        (("12,50 €", "3,99 €", "1.250,00 €"), "numbers", "absolute_error"),
        (("So 5 + 7 = 12.\n#### 12", "It is 9.\n#### 9"), "numbers", "numeric_match"),
        (("007", "012"), "short texts", "normalised_match"),  # codes
        (("2024-01-02", "2023-11-05"), "short texts", "normalised_match"),
        (("12 kg", "3 g"), "short texts", "normalised_match"),  # whose unit is part of the answer
        (("1", "2", "3", "4", "5") * 6, "ordered labels", "mean_distance"),
        (("1 star", "2 stars", "3 stars") * 6, "ordered labels", "mean_distance"),
        (("0", "1", "2", "3") * 9, "numbers", "numeric_match"),  # may be codes of labels without an order
        (GENRES, "sets of labels", "set_f1"),
        (tuple(text.replace(", ", "|") for text in GENRES), "sets of labels", "set_f1"),
        (tuple(f'["{text.replace(", ", chr(34) + ", " + chr(34))}"]' for text in GENRES), "sets of labels", "set_f1"),
        (("up, down", "down, up", "left, up", "up, left", "down, left", "left, down") * 4, "short texts", "normalised_match"),
        (("1, 2", "2, 3", "1, 3, 4") * 6, "short texts", "normalised_match"),
        (("Paris, France", "Rome, Italy", "Bern, Switzerland"), "short texts", "normalised_match"),
        (("a long answer of rather more than eight words, in all",) * 3, "texts", "chrf"),
    ],
)
def test_the_references_decide_the_kind(references: tuple[str, ...], kind: Kind, metric: str) -> None:
    found = read(*references)
    assert (found.kind, main_metric(found)) == (kind, metric), found.why


def test_sets_have_no_order() -> None:
    genres = read(*GENRES)
    assert set_f1("Comedy; Action", "action, comedy", genres) == 1.0
    assert set_f1("Genres: drama and action", "action, drama", genres) == 1.0
    assert set_f1("- action\n- horror", "action, comedy", genres) == 0.5
    assert set_f1('["comedy", "action"]', "action, comedy", genres) == 1.0
    assert set_f1("", "action, comedy", genres) == 0.0


def test_a_scale_may_be_declared() -> None:
    scale = ("low", "medium", "very high")
    found = conventions_of(("low", "medium", "low"), (), scale)
    assert found.kind == "ordered labels"
    assert [absolute_error(reply, "low", found) for reply in ("Low.", "medium", "It is very high", "no idea")] == [0, 1, 2, 2]
    assert scale_of_labels(("medium", "low"), scale) == [1, 0] and scale_of_labels(("medium", "other"), scale) is None


@pytest.mark.parametrize(
    ("labels", "places"),
    [
        (("5", "1", "2", "3", "4"), [5, 1, 2, 3, 4]), (("-1", "0", "1"), [-1, 0, 1]),
        (("1 star", "2 stars", "3 stars"), [1, 2, 3]),
        (("0", "1", "2"), None), (("1", "2", "3", "4"), None), (("a", "b", "c"), None), (("1", "2", "3", "5", "6"), None),
    ],
)  # fmt: skip
def test_labels_have_an_order_only_where_it_is_plain(labels: tuple[str, ...], places: list[int] | None) -> None:
    assert scale_of_labels(labels) == places


def test_an_error_has_the_range_of_the_answers_at_most() -> None:
    file = read("10.5", "20.5", known=("30.5",))
    assert [absolute_error(reply, "20.5", file) for reply in ("22", "1e9", "no idea")] == [1.5, 20.0, 20.0]


@pytest.mark.parametrize(
    ("references", "metric", "reply", "reference", "expected"),
    [
        (("0.5 mg", "5 mg", "1 g", "250 mcg"), normalised_match, ".5 mg", "5 mg", 0.0),
        (("0.5 mg", "5 mg", "1 g", "250 mcg"), normalised_match, "5mg", "5 mg", 1.0),
        (("q.d.", "q.i.d.", "b.i.d."), normalised_match, "qd", "q.d.", 1.0),
        (("q.d.", "q.i.d.", "b.i.d."), normalised_match, "q.d.", "q.i.d.", 0.0),
        (("1.6e-19", "9.11e-31", "6.02e23"), numeric_match, "0", "1.6e-19", 0.0),
        (("1.6e-19", "9.11e-31", "6.02e23"), numeric_match, "1.6 x 10^-19", "1.6e-19", 1.0),
        (("(1,200)", "3,400", "(75)", "880"), numeric_match, "1,200", "(1,200)", 0.0),
        (("(1,200)", "3,400", "(75)", "880"), numeric_match, "-1200", "(1,200)", 1.0),
        (("1 1/2", "2 3/4", "1/2"), numeric_match, "1.5", "1 1/2", 1.0),
        (("12%", "45%"), numeric_match, "12\u2030", "12%", 0.0),
        (("$3", "$45"), numeric_match, "HK$3", "$3", 0.0),
        (("12", "18", "54"), numeric_match, "12 \u00b1 1", "12", 1.0),
        (("foo(bar)", "a[0]", "!done"), normalised_match, "foo[bar]", "foo(bar)", 0.0),
        (("foo(bar)", "a[0]", "!done"), normalised_match, "done", "!done", 0.0),
        (("48.85, 2.35", "-33.87, 151.21", "40.71, -74.01") * 4, normalised_match, "2.35, 48.85", "48.85, 2.35", 0.0),
        (("spam", "not spam"), normalised_match, "not_spam", "not spam", 1.0),
    ],
)  # fmt: skip
def test_values_are_read_as_a_person_reads_them(
    references: tuple[str, ...], metric: Any, reply: str, reference: str, expected: float
) -> None:
    assert metric(reply, reference, read(*references)) == expected


def test_pairs_of_decimals_are_no_sets_and_four_out_of_five_is_four() -> None:
    assert read(*("48.85, 2.35", "-33.87, 151.21", "40.71, -74.01") * 4).kind != "sets of labels"
    scale = read(*("1", "2", "3", "4", "5") * 6)
    assert [scale.number(text) for text in ("4 out of 5", "4/5", "Rating: 4 of 5", "5")] == [4, 4, 4, 5]
