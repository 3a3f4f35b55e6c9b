"""Words of every script are found, and spelling in other characters, case and spacing changes nothing."""

import pytest

from lorakeet.data.copies.words import fields_sorted, is_character, letters, normal_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It was FINE – really.", ["it", "was", "fine", "really"]),
        ("Don't, don’t, dont", ["dont"] * 3),
        ("5mg or 5 mg, 1.5 and 1,000", ["5mg", "or", "5", "mg", "1.5", "and", "1,000"]),
        ("snake_case, word12, covid-19", ["snake", "case", "word12", "covid19"]),
        ("a 47-year-old: follow-up, 4-5 – 6, non- and -non", ["a", "47yearold", "followup", "4", "5", "6", "non", "and", "non"]),
        ("头疼得厉害。", ["头", "疼", "得", "厉", "害"]),
        ("ラーメンを2杯", ["ラ", "ー", "メ", "ン", "を", "2", "杯"]),
        ("ﾗｰﾒﾝ ＡＢＣ１２", ["ラ", "ー", "メ", "ン", "abc12"]),
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("안녕 하세요", ["안녕", "하세요"]),
        ("Straße STRASSE", ["strasse"] * 2),
        ("!! 😀", []),
        ("KALICI İzmir", ["kalici", "izmir"]),  # written in capitals by rules of another language
        ("kalıcı IZMIR", ["kalici", "izmir"]),
        ("> 5 km", [">", "5", "km"]),
        ("> 5 of them left\n> 0 表示禁用超时", ["5", "of", "them", "left", *"0表示禁用超时"]),
        ("<p id='a'>a < b</p> => x | y = ?", ["p", "id", "a", "a", "<", "b", "p", "x", "y"]),
        ("a % b, 5 %, a||b, List<int>", ["a", "%", "b", "5", "%", "a", "||", "b", "list", "int"]),
    ],
)
def test_words_of_many_scripts(text: str, words: list[str]) -> None:
    assert normal_words(text) == words


def test_letters_are_equal_where_spacing_alone_differs() -> None:
    assert letters(normal_words("ice cream, follow-up")) == letters(normal_words("icecream followup")) == "icecreamfollowup"
    assert letters(normal_words("5 mg")) == letters(normal_words("5mg")) == "5mg"
    assert letters(["1", "23"]) != letters(["12", "3"]) and letters(normal_words("1.5 mg")) != letters(normal_words("15 mg"))


def test_characters_are_words_of_scripts_without_spaces() -> None:
    assert [is_character(word) for word in ("疼", "ラ", "ที่", "ice", "5", "하세요")] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("name: Ann\ncity: Rome\nage: 3", "age: 3\nname: Ann\ncity: Rome", True),
        ('{"name": "Ann", "age": 3, "city": "Rome"}', '{"city": "Rome", "name": "Ann", "age": 3}', True),
        ("a = 1; b = 2; c = 3", "c = 3; a = 1; b = 2", True),
        ("Facts:\nname: Ann\ncity: Rome\nage: 3\n\nIs she old?", "Facts:\nage: 3\nname: Ann\ncity: Rome\n\nIs she old?", True),
        ("name: Ann\ncity: Rome\nage: 3", "name: Rome\ncity: Ann\nage: 3", False),
        ("total = price\nprice = total\nnet = price", "net = price\nprice = total\ntotal = price", False),
        ("User: yes\nBot: no\nUser: maybe", "User: maybe\nBot: no\nUser: yes", False),
        ("name: Ann\ncity: Rome", "city: Rome\nname: Ann", False),
        ("Sort 3, 1, 2 at 10:30, 11:40, 12:50", "Sort 1, 3, 2 at 10:30, 11:40, 12:50", False),
        ('{"a": {"x": 1}, "b": {"y": 2}}', '{"b": {"x": 1}, "a": {"y": 2}}', False),
    ],
)
def test_fields_in_another_order_are_the_same(one: str, other: str, equal: bool) -> None:
    assert (normal_words(fields_sorted(one)) == normal_words(fields_sorted(other))) is equal
