"""A row's key and text depend on its content and on nothing else."""

from lorakeet.data.rows import SHOWN, Row, Turn, some_sources


def labelled(text: str, prompt: str = "{}", label: str = "good", source: str = "a:1") -> Row:
    whole = prompt.format(text)
    start = prompt.index("{}")
    question = Turn("user", whole, False, free=(start, start + len(text)))
    return Row((question, Turn("assistant", label, True)), label, None, source)


def test_key_ignores_template_source_group_and_system_prompt():
    plain = labelled("fine film")
    dressed = labelled("fine film", prompt="Review: {}\nAnswer:", source="b:9")
    with_system = Row((Turn("system", "Be brief.", False), *plain.turns), "good", "group", "c:1")
    assert plain.key == dressed.key == with_system.key


def test_key_tells_text_label_and_role_apart():
    keys = {
        labelled("fine film").key,
        labelled("fine films").key,
        labelled("fine film", label="bad").key,
        Row((Turn("", "fine film", True),), None, None, "a:1").key,
        Row((Turn("user", "fine film", False), Turn("assistant", "good", True)), None, None, "a:1").key,
    }
    assert len(keys) == 5


def test_key_does_not_run_turns_together():
    one = Row((Turn("user", "ab", False), Turn("assistant", "c", True)), None, None, "")
    other = Row((Turn("user", "a", False), Turn("assistant", "bc", True)), None, None, "")
    assert one.key != other.key


def test_label_wording_does_not_change_the_key():
    worded = Row((Turn("user", "x", False), Turn("assistant", "It is good.", True)), "good", None, "")
    plain = Row((Turn("user", "x", False), Turn("assistant", "good", True)), "good", None, "")
    assert worded.key == plain.key


def test_text_is_what_the_user_says_without_template():
    assert labelled("fine film", prompt="Review: {}\nAnswer:").text == "fine film"
    chat = Row(
        (Turn("system", "s", False), Turn("user", "one", False), Turn("assistant", "a", True), Turn("user", "two", False)),
        None,
        None,
        "",
    )
    assert chat.text == "one\ntwo"
    assert Row((Turn("", "raw", True),), None, None, "").text == "raw"


def test_a_message_names_the_first_places_and_counts_the_others():
    places = [f"rows.csv:{number}" for number in range(1, 8)]
    assert some_sources(places[:2]) == "rows.csv:1, rows.csv:2"
    assert some_sources(places) == f"{', '.join(places[:SHOWN])} and 2 more"
