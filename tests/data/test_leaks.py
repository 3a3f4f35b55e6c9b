"""Copies and near-copies are found and named, and give way on the right side."""

import random
from dataclasses import replace
from itertools import islice, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.copies.words import fields_sorted, normal_words
from lorakeet.data.leaks import MANY, _documents, _reordered, check_leaks, counted_once, find_duplicates, search_leaks
from lorakeet.data.prepare import load_dataset
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError

WORDS = [f"word{number}" for number in range(500)]


def row(text, source, label="a"):
    return Row((Turn("user", text, False), Turn("assistant", label, True)), label, None, source)


def texts(count, seed, length=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def edited(text):
    words = text.split()
    words[30] = "changed"
    return " ".join(words)


def rows(name, *given_texts):
    return [row(text, f"{name}:{number}") for number, text in enumerate(given_texts, start=1)]


def spec(**settings_):
    return DataSpec(train="x", **settings_)


def test_exact_copies_are_found_under_other_case_and_punctuation():
    (pair,) = find_duplicates({"test": rows("t", "It was FINE, really."), "training": rows("a", "it was fine – really")}, 0)
    assert pair.exact and pair.similarity == 1.0
    assert str(pair) == "training a:1 and test t:1 (exact copy): 'it was fine – really…'"


def test_near_copies_are_found_with_their_similarity():
    first, second, third = texts(3, seed=0)
    parts = {"test": rows("t", first), "training": rows("a", second, edited(first), third)}
    (pair,) = find_duplicates(parts, 0.8)
    assert (pair.row.source, pair.twin.source, pair.exact, pair.kind) == ("a:2", "t:1", False, "near")
    assert pair.similarity == pytest.approx(59 / 60)
    assert find_duplicates(parts, 0.99) == () and find_duplicates(parts, 0) == ()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3).map(" ".join), min_size=2, max_size=12),
    st.integers(1, 11),
    st.randoms(use_true_random=False),
)
def test_no_copy_is_missed_and_none_invented(given_texts, cut, chance):
    test, train = rows("t", *given_texts[:cut]), rows("a", *given_texts[cut:])
    expected = {one.source for one in train for other in test if one.text.split() == other.text.split()}
    for _ in range(2):
        pairs = find_duplicates({"test": test, "training": train}, 0)
        assert {pair.row.source for pair in pairs if pair.row_part != pair.twin_part} == expected
        chance.shuffle(train)


def test_short_and_wordless_texts():
    assert find_duplicates({"test": rows("t", "ok", "!!"), "training": rows("a", "no", "??")}, 0.8) == ()
    found = find_duplicates({"test": rows("t", "ok", "!!"), "training": rows("a", "OK.", "!!")}, 0.8)
    assert [pair.row.source for pair in found] == ["a:1", "a:2"]


def test_row_is_dropped_from_training_and_named():
    good, leaked, tested = texts(3, seed=1)
    clean = check_leaks(rows("a", good, leaked), rows("h", tested, edited(leaked)), [], spec())
    assert [r.source for r in clean.train] == ["a:1"] and len(clean.held_out) == 2
    assert [r.source for r in clean.report.dropped] == ["a:2"]
    method, counted, named, one, other = clean.report.lines()
    assert method.startswith("Searched 2 training, 2 held-out rows for texts that share 80 % of their words")
    assert "cannot find paraphrases" in method
    assert counted == "1 row is on both sides of a split (1 dropped): 1 × near-copy."
    assert "training a:2 and held-out h:2 (near-copy, similarity 0.98)" in named
    assert one.startswith("    training: …") and " changed " not in one
    assert other.startswith("    held-out: …") and " changed " in other


def test_many_near_copies_name_the_settings_that_keep_them():
    """Other rows of a short template can be taken for copies; a few copies among many rows are none of them."""
    many = texts(10, seed=4)
    clean = check_leaks(rows("a", *map(edited, many[:6]), *texts(4, seed=5)), rows("h", *many), [], spec())
    [said] = [line for line in clean.report.lines() if "left out because" in line]
    assert said.startswith("6 rows are left out because they differ from another") and "--data.near_duplicates 0" in said
    assert clean.report.much_dropped() == (
        "6 of 10 training rows were DROPPED as copies of held-out or test rows, 6 of them near-copies"
    )
    assert clean.report.warning().startswith(f"{clean.report.much_dropped()}; 4 were trained. If near-copies are other rows of")
    assert len(clean.report.dropped) == 6
    few = check_leaks(rows("a", *map(edited, many[:4]), *texts(6, seed=5)), rows("h", *many), [], spec())
    assert len(few.report.dropped) == 4 and not any("left out because" in line for line in few.report.lines())
    one = check_leaks(rows("a", many[0], *texts(9, seed=5)), rows("h", *many), [], spec())
    assert len(one.report.dropped) == 1 and one.report.much_dropped() == one.report.warning() == "", "a tenth is not more"


def test_held_out_row_gives_way_to_a_test_row():
    one, two, three, four = texts(4, seed=2)
    clean = check_leaks(rows("a", one), rows("h", two, three), rows("t", three, four), spec())
    assert [r.source for r in clean.held_out] == ["h:1"] and len(clean.test) == 2 and len(clean.train) == 1


def test_all_copies_of_a_leaked_row_are_dropped():
    one, two = texts(2, seed=3)
    clean = check_leaks(rows("a", two, one, edited(one), one), rows("h", one, "something else entirely"), [], spec())
    assert [r.source for r in clean.train] == ["a:1"] and len(clean.report.dropped) == 3


def test_repeats_inside_training_are_reported_and_kept():
    one, two, three = texts(3, seed=4)
    clean = check_leaks(rows("a", one, one, two), rows("h", three), [], spec())
    assert len(clean.train) == 3 and not clean.report.across
    fate = "It stays, and counts twice."
    said = f"1 training row repeats another: 1 × exact copy. {fate} First {clean.report.within[0]}"
    assert clean.report.lines()[1:] == [said]


def test_policies_keep_and_refuse():
    one, two, three = texts(3, seed=5)
    kept = check_leaks(rows("a", one, two), rows("h", two, three), [], spec(on_leak="keep"))
    assert len(kept.train) == 2 and len(kept.report.across) == 1 and "kept" in kept.report.lines()[1]
    with pytest.raises(
        DataError,
        match=r"(?s)1 pairs of .* \(1 × exact copy\).*'refuse'.*training a:2 and held-out h:1 \(exact copy\).*Remove one",
    ):
        check_leaks(rows("a", one, two), rows("h", two, three), [], spec(on_leak="refuse"))


def test_held_out_equal_to_training_is_refused_even_if_leaks_are_kept():
    some = texts(4, seed=6)
    with pytest.raises(DataError, match=r"All 4 held-out rows are training rows too \(h:1 is the first\)"):
        check_leaks(rows("a", *some), rows("h", *some), [], spec(on_leak="keep"))
    with pytest.raises(DataError, match=r"All 2 test rows are training rows too"):
        check_leaks(rows("a", *some), [], rows("t", *some[:2]), spec())


def test_training_that_would_be_empty_is_refused():
    one, two = texts(2, seed=7)
    with pytest.raises(DataError, match=r"Every training row has a copy or near-copy .*keep if equal prompts are intended"):
        check_leaks(rows("a", one), [row(one, "h:1", label="b"), row(two, "h:2")], [], spec())


def test_no_leak_is_said_too():
    one, two = texts(2, seed=8)
    assert check_leaks(rows("a", one), rows("h", two), [], spec()).report.lines()[1:] == ["No duplicate rows found."]
    (method, _) = check_leaks(rows("a", one), rows("h", two), [], spec(near_duplicates=0)).report.lines()
    assert method.endswith("Near-copies were not searched, as data.near_duplicates says.")


# Planted copies


def prose(count, seed, lengths):
    """Sentences of pseudo-words with the frequencies of words in English (Zipf's law)."""
    chance = random.Random(seed)
    weights = [1 / (rank + 3) for rank in range(3000)]
    words = [f"w{rank}" for rank in range(3000)]
    found = {" ".join(chance.choices(words, weights, k=chance.choice(lengths))): None for _ in range(count)}
    return list(found)


def found_copies(given_texts, copies):
    """How many of the copies of the first texts are found among all others."""
    held_out, others = rows("h", *given_texts[: len(copies)]), rows("o", *given_texts[len(copies) :])
    pairs = find_duplicates({"held-out": held_out, "training": [*others, *rows("c", *copies)]}, 0.8)
    across = [pair for pair in pairs if pair.row_part != pair.twin_part]
    right = {pair.row.source for pair in across if pair.row.source.replace("c:", "h:") == pair.twin.source}
    wrong = len({pair.row.source for pair in across if not pair.row.source.startswith("c:")})
    assert wrong * 100 <= len(given_texts), f"{wrong} other rows were taken for copies"
    return len(right)


def replaced(text, chance):
    words = text.split()
    words[chance.randrange(len(words))] = f"changed{chance.randrange(10**6)}"
    return " ".join(words)


def test_twenty_copies_with_one_word_changed_are_found_in_rows_of_5_to_16_words():
    chance = random.Random(1)
    given_texts = prose(400, 1, range(5, 17))
    assert found_copies(given_texts, [replaced(text, chance) for text in given_texts[:20]]) == 20


@pytest.mark.parametrize("length", [4, 5, 8, 16])
def test_one_word_changed_is_found_in_19_of_20_rows(length):
    chance = random.Random(length)
    given_texts = prose(1000, length, [length])
    assert found_copies(given_texts, [replaced(text, chance) for text in given_texts[:200]]) >= 190


@pytest.mark.parametrize("first", ["一", "ぁ"])
def test_one_character_changed_is_found_in_9_of_10_rows_without_spaces(first):
    chance = random.Random(4)
    characters = [chr(ord(first) + number) for number in range(80 if first == "ぁ" else 1500)]
    weights = [1 / (rank + 10) for rank in range(len(characters))]
    given_texts = list({"".join(chance.choices(characters, weights, k=chance.randrange(8, 30))): None for _ in range(600)})

    def changed(text):
        place = chance.randrange(len(text))
        return text[:place] + "龘" + text[place + 1 :] + "。"

    assert found_copies(given_texts, [changed(text) for text in given_texts[:100]]) >= 90


def pairs_of(given_texts):
    half = len(given_texts) // 2
    return find_duplicates({"held-out": rows("h", *given_texts[:half]), "training": rows("a", *given_texts[half:])}, 0.8)


@pytest.mark.slow
def test_different_rows_of_one_template_are_no_copies():
    chance = random.Random(5)
    sides, bones = ("left", "right", "unspecified"), [f"bone{number}" for number in range(30)]
    labels = {
        f"Displaced {chance.choice(('spiral', 'oblique', 'comminuted'))} fracture of shaft of {chance.choice(sides)} "
        f"{chance.choice(bones)}, {chance.choice(('initial encounter', 'subsequent encounter with healing', 'sequela'))}"
        for _ in range(2000)
    }
    assert len(labels) > 500 and len(pairs_of(sorted(labels))) <= len(labels) * (len(labels) - 1) / 2 / 1000
    asked = [f"What is the capital of {name}, and how many people live there?" for name in prose(800, 6, [1, 2])]
    assert pairs_of(asked) == ()


def test_an_instruction_weighs_nothing_in_chats_and_a_copied_input_below_it_is_found():
    chance = random.Random(7)
    instruction = " ".join(prose(1, 8, [60])[0].split())
    inputs = prose(500, 9, range(4, 12))
    assert pairs_of([f"{instruction}\n\n{text}" for text in inputs]) == ()
    copies = [f"{instruction}\n\n{replaced(text, chance)}" for text in inputs[:100]]
    assert found_copies([f"{instruction}\n\n{text}" for text in inputs], copies) >= 95


# Kinds


def chat(prompt, answer, source, group=None):
    return Row((Turn("user", prompt, False), Turn("assistant", answer, True)), None, group, source)


def test_the_same_prompt_with_another_answer_is_a_kind_of_its_own():
    train = [chat("Who wrote Emma?", "Jane Austen.", "a:1"), chat("Who wrote Persuasion?", "Jane Austen.", "a:2")]
    clean = check_leaks(train, [chat("who wrote Emma", "Austen, in 1815", "h:1")], [], spec())
    (pair,) = clean.report.across
    assert pair.kind == "prompt" and pair.exact and [row.source for row in clean.train] == ["a:2"]
    counted, named, one, other = clean.report.lines()[1:]
    assert counted.endswith("1 × same prompt, other answer.") and "(same prompt, other answer)" in named
    assert one.endswith("→ Jane Austen.") and other.endswith("→ Austen, in 1815")
    copied = check_leaks(train, [chat("who wrote Emma", "JANE AUSTEN", "h:1")], [], spec())
    assert [pair.kind for pair in copied.report.across] == ["copy"]


def test_where_many_rows_have_one_prompt_their_answers_are_compared():
    tales = texts(2 * MANY[0] + 1, seed=11)
    train = [chat("Tell a tale.", tale, f"a:{number}") for number, tale in enumerate(tales[:-1])]
    answers = (tales[-1], edited(tales[3]), tales[5])
    held_out = [chat("Tell a tale!", answer, f"h:{number}") for number, answer in enumerate(answers, start=1)]
    clean = check_leaks(train, held_out, [], spec())
    assert sorted((pair.kind, pair.row.source, pair.twin.source) for pair in clean.report.across) == [
        ("copy", "a:5", "h:3"), ("near", "a:3", "h:2"),
    ]  # fmt: skip
    assert len(clean.train) == len(train) - 2


def test_a_group_stays_on_one_side_of_files_too():
    def of(group, text, source):
        return Row((Turn("user", text, False), Turn("assistant", "a", True)), "a", group, source)

    one, two, three, four = texts(4, seed=12)
    train, held_out = [of("ann", one, "a:1"), of("bob", two, "a:2")], [of("ann", three, "h:1"), of("eve", four, "h:2")]
    clean = check_leaks(train, held_out, [], spec())
    (pair,) = clean.report.across
    assert (pair.kind, pair.row.source, pair.twin.source) == ("group", "a:1", "h:1")
    assert [row.source for row in clean.train] == ["a:2"] and "1 × same group" in clean.report.lines()[1]


def test_the_order_of_rows_changes_nothing():
    chance = random.Random(13)
    given_texts = prose(300, 13, range(4, 20))
    copies = [replaced(text, chance) for text in given_texts[:60]] + given_texts[60:80]
    test, train = rows("t", *given_texts[:100]), rows("a", *given_texts[100:], *copies, *copies[:5])
    found = find_duplicates({"test": test, "training": train}, 0.8)
    assert len({pair.row.source for pair in found if pair.row_part != pair.twin_part}) > 75
    for _ in range(3):
        chance.shuffle(test)
        chance.shuffle(train)
        assert find_duplicates({"test": test, "training": train}, 0.8) == found


def test_every_evaluated_row_that_training_rows_repeat_is_named_when_it_may_be_dropped():
    one, two = texts(2, seed=14)
    found = find_duplicates({"training": rows("a", one, two), "test": rows("t", one, one, edited(one))}, 0.8)
    across = [pair for pair in found if pair.row_part != pair.twin_part]
    assert sorted((pair.row.source, pair.twin.source) for pair in across) == [("t:1", "a:1"), ("t:2", "a:1"), ("t:3", "a:1")]


def test_the_drug_review_that_stands_in_both_files(drug_reviews):
    dataset = load_dataset(
        DataSpec(
            train=f"{drug_reviews}!drugsComTrain.tsv",
            test=f"{drug_reviews}!drugsComTest.tsv",
            text_column="review",
            label_column="rating",
            html_unescape=True,
            strip_quotes=True,
            template="Review: {text}\nRating:",
        )
    )
    (pair,) = dataset.leaks.across
    assert pair.exact and pair.row.text.startswith("After I had it removed 3 months ago")
    assert (pair.row_part, pair.twin_part) == ("training", "test")
    assert (len(dataset.train), len(dataset.held_out), len(dataset.test)) == (539, 60, 379)
    assert dataset.labels == ("negative", "neutral", "positive")


def question(city, source, answer, call=""):
    said = Turn("user", f"Will it rain in {city} tomorrow evening?", False)
    return Row((said, Turn("assistant", answer, True, extra=call)), None, None, source)


def test_a_row_whose_answer_takes_up_another_word_is_another_row():
    """27 of 126 rows of tool calls were dropped: "Will it rain in Oslo?" and the same with another city."""
    oslo, lima = '[{"arguments": {"city": "Oslo"}}]', '[{"arguments": {"city": "Lima"}}]'
    cases = (
        (question("Oslo", "a:1", '{"city": "Oslo"}'), question("Lima", "h:1", '{"city": "Lima"}'), 0),
        (question("Oslo", "a:1", "", oslo), question("Lima", "h:1", "", lima), 0),
        (question("Oslo", "a:1", "yes"), question("Lima", "h:1", "no"), 1),  # what differs is in no answer
        (question("Oslo", "a:1", '{"city": "Oslo"}'), question("Lima", "h:1", '{"city": "Oslo"}'), 1),
        (question("Oslo", "a:1", "In Oslo it will."), question("rainy Oslo", "h:1", "In Oslo it will, rainy as it is."), 1),
    )
    for first, second, count in cases:
        assert len(find_duplicates({"held-out": [second], "training": [first]}, 0.8)) == count, (first.turns, second.turns)


def test_an_exact_copy_among_measured_rows_is_one_observation():
    given = [("Cold soup!", "food"), ("Warm soup", "food"), ("Cold soup!", "food"), ("Cold soup!", "bill")]
    rows = [row(text, str(place), label) for place, (text, label) in enumerate(given)]
    assert [one.source for one in counted_once(rows)] == ["0", "1", "3"], "another answer is another observation"
    called = [rows[0], replace(rows[0], tools="[]"), rows[2]]
    assert counted_once(called) == called[:2], "other tools too"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (row("Compute 3 - 5", "1", "2"), row("Compute 3 + 5", "2", "2")),
        (row("if a < b", "1"), row("if a > b", "2")),
        (row("Great!", "1"), row("great?", "2")),
        (row("Cold soup", "1"), row("cold  SOUP.", "2")),
        (Row((Turn("", "return x", True),), None, None, "1"), Row((Turn("", "return -x", True),), None, None, "2")),
    ],
)
def test_rows_that_differ_in_a_sign_are_all_measured(one, other):
    assert counted_once([one, other]) == [one, other]


def conversation(system="", result="", calls="", filled="Rate: {}", rejected=""):
    turns = (
        Turn("system", system, False), Turn("user", filled.format("fine"), False, (6, 10)),
        Turn("assistant", "", False, extra=calls), Turn("tool", result, False),
    )  # fmt: skip
    return Row((*turns, Turn("assistant", "no", True)), None, None, "f:1", rejected=(Turn("assistant", rejected, True),))


@pytest.mark.parametrize(
    "other",
    [{"system": "Is it spam?"}, {"result": "5"}, {"calls": "[1]"}, {"filled": "Mark: {}"}, {"rejected": "No"}],
    ids=["system prompt", "result of a tool", "call of a tool", "template's other fields", "rejected answer"],
)  # fmt: skip
def test_all_that_a_model_reads_or_writes_makes_another_row(other):
    assert len(counted_once([conversation(), conversation(**other)])) == 2
    assert len(counted_once([conversation(**other), conversation(**other)])) == 1


def test_what_happens_to_repeated_rows_is_said_as_it_is():
    same = [row("The soup was cold again", f"f:{place}") for place in range(3)]
    report = search_leaks({"test": [], "held-out": same[:2], "training": []}, DataSpec(train="x"))
    fate = "It stays; the report measures rows that are equal to the character once."
    assert f"1 held-out row repeats another: 1 × exact copy. {fate}" in report.lines()[1]
    for preferred in ([replace(one, rejected=one.turns) for one in same], [replace(one, desirable=True) for one in same]):
        report = search_leaks({"test": [], "held-out": preferred, "training": []}, DataSpec(train="x"))
        assert "They stay. First" in report.lines()[1], "each is measured"
    report = search_leaks({"test": [], "held-out": [], "training": same}, DataSpec(train="x"))
    assert "2 training rows repeat others: 2 × exact copy. They stay, and count twice." in report.lines()[1]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("Wife: he sleeps badly\nDoctor: since when is it so\nSon: for a week now", True),
        ("1. step one: heat the oil\n2. step two: add the rice\n3. step three: stir it", False),
        ("total = price\nprice = total\nnet = price", False),
        ("name: Ann\ncity: Rome\nage: 34", True),
    ],
)
def test_lines_in_another_order_are_no_exact_copy(text, near):
    """Fields in another order are near-copies: not where these are off."""
    given = {
        "held-out": [row(text, "h:1"), row("The weather is fine in May", "h:2")],
        "training": [row("\n".join(reversed(text.splitlines())), "t:1")],
    }
    assert find_duplicates(given, 0) == ()
    assert [(pair.kind, pair.similarity) for pair in find_duplicates(given, 0.8)] == [("near", 1.0)] * near


def test_reordered_rows_are_paired_with_the_first_of_each_part_only():
    """All pairs of 300 orders of the same fields would be 45,000, and grow with the square of the rows."""
    orders = islice(permutations(["name: ann", "age: 41", "town: oslo", "pet: cat", "car: red", "job: cook"]), 300)
    given_texts = ["\n".join(fields) for fields in orders]
    parts = {"training": rows("a", *given_texts[:200]), "test": rows("t", *given_texts[200:])}
    documents = [one for one in _documents(parts) if not one.answers]
    words = [normal_words(fields_sorted(document.text)) for document in documents]
    assert len(documents) == 300 and len({tuple(one) for one in words}) == 1
    assert len(list(_reordered(documents, words))) == 2 * (300 - 1)
    found = {(pair.row_part, pair.twin_part, pair.row.source) for pair in find_duplicates(parts, 0.8) if pair.kind == "near"}
    assert len({place for place in found if place[0] != place[1]}) >= 100, "every test row, or its twin"
