"""Every shape of record becomes the right turns, and records that cannot say what is wrong with them."""

import pytest

from lorakeet.data.shapes import columns_used, shape_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError
from lorakeet.registry import ANY, objectives


def shape(*values, objective=None, **settings):
    problems = RowProblems("bad")
    records = (FileRecord(f"f:{number}", value) for number, value in enumerate(values, start=1))
    rows = list(shape_rows(records, "f.jsonl", DataSpec(train="f", **settings), problems, objectives().get(objective, ANY)))
    problems.raise_if_any()
    return rows


def said(row):
    return [(turn.role, turn.text, turn.supervised) for turn in row.turns]


def test_chat_messages():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
        {"role": "assistant", "content": "Bye!", "weight": 0},
    ]
    (row,) = shape({"messages": messages, "id": 3}, group_column="id")
    assert said(row) == [
        ("system", "Be brief.", False),
        ("user", "Hi", False),
        ("assistant", "Hello", True),
        ("user", "Bye", False),
        ("assistant", "Bye!", False),
    ]
    assert row.group == "3" and row.source == "f:1" and row.label is None


def test_sharegpt_conversations():
    (row,) = shape({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    assert said(row) == [("user", "Hi", False), ("assistant", "Hello", True)]


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_prompt_and_completion(answer):
    (row,) = shape({"prompt": "2+2=", answer: " 4"})
    assert said(row) == [("user", "2+2=", False), ("assistant", " 4", True)]


def test_prompt_and_completion_as_messages():
    (row,) = shape({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]})
    assert said(row) == [("user", "a", False), ("assistant", "b", True)]


def test_alpaca_with_and_without_input():
    rows = shape(
        {"instruction": "Translate", "input": "chat", "output": "cat"}, {"instruction": "Sing", "input": "", "output": "la"}
    )
    assert [said(row)[0][1] for row in rows] == ["Translate\n\nchat", "Sing"]
    assert said(rows[1])[1] == ("assistant", "la", True)


def test_plain_text_gets_no_system_prompt():
    (row,) = shape({"text": "once upon a time"}, system="Be brief.")
    assert said(row) == [("", "once upon a time", True)]


def test_classification_with_template_and_system_prompt():
    (row,) = shape(
        {"review": "&quot;fine&quot;", "title": "T", "stars": 5},
        text_column="review",
        label_column="stars",
        template="{title}: {text}\nStars:",
        label_template="{label} stars",
        html_unescape=True,
        strip_quotes=True,
        system="Rate.",
    )
    assert said(row) == [("system", "Rate.", False), ("user", "T: fine\nStars:", False), ("assistant", "5 stars", True)]
    assert row.label == "5" and row.text == "fine"


def test_template_may_name_the_text_column_itself():
    (row,) = shape({"review": "fine", "label": "x"}, text_column="review", template="<{review}>")
    assert row.turns[0].text == "<fine>" and row.text == "fine"


def test_text_and_label_are_found_without_settings():
    (row,) = shape({"text": "fine", "label": "good"})
    assert row.label == "good" and said(row) == [("user", "fine", False), ("assistant", "good", True)]


def test_missing_column_lists_those_there_are_and_the_nearest():
    with pytest.raises(
        DataError, match=r"no column 'reveiw'; it has 'review', 'rating'. Did you mean 'review'\?.*--data.text_column"
    ):
        shape({"review": "a", "rating": "b"}, text_column="reveiw", label_column="rating")
    with pytest.raises(DataError) as caught:
        shape({"review": "a"}, format="classification", group_column="patient")
    assert all(f"no column '{column}'" in str(caught.value) for column in ("text", "label", "patient"))


def test_unknown_shape_lists_the_columns():
    with pytest.raises(DataError, match=r"the columns 'frage', 'antwort' match no known shape.*'prompt' and 'completion'"):
        shape({"frage": "a", "antwort": "b"})


def test_all_bad_rows_are_named_in_one_message():
    with pytest.raises(DataError) as caught:
        shape(
            {"text": "a", "label": "x"},
            {"text": "  ", "label": "x"},
            {"text": None, "label": "x"},
            {"text": "b", "label": ""},
            {"text": ["b"], "label": "x"},
            {"text": "c", "label": "z"},
            labels=("x", "zz"),
        )
    message = str(caught.value)
    assert "5 problems" in message and "f:1" not in message
    assert "f:2: column 'text' is empty" in message and "f:3: column 'text' is empty" in message
    assert "f:4: column 'label' is empty" in message and "f:5: column 'text' has a value of type list" in message
    assert "f:6: label 'z' is not one of data.labels ('x', 'zz'). Did you mean 'zz'?" in message


def test_half_a_character_is_refused():
    with pytest.raises(DataError, match="half of a character at position 5"):
        shape({"text": "good \ud83d"})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "expected a list of messages"),
        ("hello", "expected a list of messages, got 'hello'"),
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        ([{"role": "asistant", "content": "a"}], "role 'asistant'.*Did you mean 'assistant'"),
        ([{"role": "critic", "content": "a"}], "role 'critic'; expected one of system, user, assistant, tool"),
        ([{"role": "assistant", "content": " "}], r"message 1 \(assistant\) has no text"),
        ([{"role": "assistant", "content": None}], r"message 1 \(assistant\) has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has parts that are not text"),
        (["a"], "message 1 is str"),
    ],
)
def test_bad_messages(messages, said):
    with pytest.raises(DataError, match=said):
        shape({"messages": messages})


def test_nan_is_an_empty_field():
    with pytest.raises(DataError, match="f:2: column 'label' is empty"):
        shape({"text": "a", "label": 1.0}, {"text": "b", "label": float("nan")})


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PAIR = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("record", "settings", "found"),
    [
        ({"messages": MESSAGES, **PAIR}, {}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"messages": MESSAGES, "label": True}, {}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"prompt": "2+2=", "completion": "4", **PAIR}, {}, [("user", "2+2="), ("assistant", "4")]),
        ({"prompt": "2+2=", "completion": "4", "label": False}, {}, [("user", "2+2="), ("assistant", "4")]),
        ({"instruction": "Sing", "output": "la", **PAIR}, {}, [("user", "Sing"), ("assistant", "la")]),
        ({"text": "fine", "label": True, **PAIR}, {}, [("user", "fine"), ("assistant", "True")]),
        ({"text": "once", **PAIR}, {}, [("", "once")]),
        ({"messages": MESSAGES, "text": "a", "by": 5, **PAIR}, {"label_column": "by"}, [("user", "a"), ("assistant", "5")]),
    ],
)  # fmt: skip
def test_sft_trains_on_what_it_did_beside_columns_of_preferences(record, settings, found):
    (row,) = shape(record, objective="sft", **settings)
    assert [(turn.role, turn.text) for turn in row.turns] == found and not row.rejected and row.desirable is None


def test_only_pairs_are_pairs_for_sft_too():
    (row,) = shape({"prompt": "p", **PAIR}, objective="sft")
    assert row.rejected and shape({"prompt": "p", "completion": "c", **PAIR})[0].rejected


@pytest.mark.parametrize(("value", "wanted"), [("true", True), ("false", False), (1, True), (0, False)])
def test_kto_reads_a_verdict_of_any_kind(value, wanted):
    for record in ({"prompt": "p", "completion": "c"}, {"messages": MESSAGES}):
        (row,) = shape({**record, "label": value}, objective="kto")
        assert row.desirable is wanted
    with pytest.raises(DataError, match="column 'label' is 'perhaps'"):
        shape({"messages": MESSAGES, "label": "perhaps"}, objective="kto")


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ({"prompt": "a", "completion": "b", "id": 1}, {}, ("completion", {"prompt": "prompt", "completion": "answer"})),
        ({"review": "a", "stars": "5", "x": ""}, {"text_column": "review", "label_column": "stars"},
         ("classification", {"review": "prompt", "stars": "label"})),
        ({"chosen": "a", "rejected": "b", "prompt": "c"}, {},
         ("preference", {"prompt": "prompt", "chosen": "better answer", "rejected": "worse answer"})),
        ({"text": "a", "author": "b"}, {"group_column": "author"},
         ("text", {"text": "text", "author": "group, kept on one side of the split"})),
    ],
)  # fmt: skip
def test_the_columns_that_are_read_are_named(values, settings, expected):
    spec = DataSpec(train="f", **settings)
    objective = "dpo" if "chosen" in values else "sft"
    assert columns_used(FileRecord("f:1", values), "f.jsonl", spec, objectives()[objective]) == expected


def test_a_record_of_no_shape_names_no_columns():
    with pytest.raises(DataError, match="match no known shape"):
        columns_used(FileRecord("f:1", {"a": 1}), "f.jsonl", DataSpec(train="f"))
