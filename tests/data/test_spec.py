"""Settings are refused all at once, each with its value; templates are filled and their text found again."""

from dataclasses import fields

import pytest

from lorakeet.data.spec import DataSpec, fill_template, template_fields
from lorakeet.errors import ConfigError


def test_defaults_need_only_a_file():
    DataSpec(train="rows.jsonl").validate()


def test_every_field_has_help():
    assert all(field.metadata["help"].endswith(".") for field in fields(DataSpec))


def test_all_problems_are_listed_at_once():
    spec = DataSpec(
        train=" ",
        held_out_fraction=1.0,
        near_duplicates=float("nan"),
        held_out_minimum=-1,
        max_tokens=1,
        limit=0,
        labels=("a", "b", "a"),
        template="no column",
        label_template="{text}",
    )
    with pytest.raises(ConfigError) as caught:
        spec.validate()
    message = str(caught.value)
    assert "9 problems" in message
    for part in ("data.train", "1.0", "nan", "-1", "is 1;", "is 0;", "'a'", "'no column'", "'{text}'"):
        assert part in message


@pytest.mark.parametrize("template", ["{text", "{text!r}", "{text:>10}", "text}", "{}"])
def test_broken_templates_are_refused(template):
    with pytest.raises(ConfigError, match="literal braces"):
        DataSpec(train="x.csv", template=template).validate()


def test_one_label_is_refused():
    with pytest.raises(ConfigError, match="only 'yes'"):
        DataSpec(train="x.csv", labels=("yes",)).validate()


def test_fill_template_finds_the_text_and_keeps_braces():
    template = '{{"film": "{title}"}}\n{text}!'
    text, span = fill_template(template, {"title": "{text}", "text": "good {film}"}, "text")
    assert text == '{"film": "{text}"}\ngood {film}!'
    assert span is not None and text[span[0] : span[1]] == "good {film}"
    assert template_fields(template) == ["title", "text"]
    assert fill_template("{title}", {"title": "a"}, "text") == ("a", None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"encoding": "utf-99"}, "data.encoding is 'utf-99'"),
        ({"encoding": "hex"}, "data.encoding is 'hex'"),
        ({"delimiter": "::"}, "data.delimiter is '::'; expected one"),
        ({"delimiter": '"'}, "data.delimiter is '\"'; expected one"),
    ],
)
def test_encodings_and_separators_that_cannot_be(given: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataSpec(train="x", **given).validate()  # type: ignore[arg-type]
