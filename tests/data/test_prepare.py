"""From a spec to all rows of a run, or to one message that says what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorakeet.data.prepare import check_labels, find_labels, load_dataset, template_remedy, unnamed_labels_note
from lorakeet.data.proposals.labels import merges, merging
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec, fill_template, template_fields
from lorakeet.errors import ConfigError, DataError
from lorakeet.settings import load
from tiny.runs import write_rows

NOUNS = ("film", "book", "song", "play", "meal", "trip", "game", "show", "talk", "walk")


def write(path, labels, count=40, start=0):
    rows = [
        {
            "text": f"{NOUNS[n % 10]} {n} was {n * n} and then {n * 7} more of {NOUNS[n // 10 % 10]}",
            "label": labels[n % len(labels)],
        }
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_one_file_is_split(tmp_path):
    dataset = load_dataset(DataSpec(train=write(tmp_path / "a.jsonl", ["b", "a"])))
    assert (len(dataset.train), len(dataset.held_out), dataset.test, dataset.labels) == (36, 4, (), ("a", "b"))
    record = dataset.split_record()
    assert record["held_out"] == sorted(row.key for row in dataset.held_out) and record["train_rows"] == 36


def test_files_of_their_own(tmp_path):
    spec = DataSpec(
        train=write(tmp_path / "a.jsonl", ["a", "b"]),
        held_out=write(tmp_path / "h.jsonl", ["a", "b"], 10, 100),
        test=write(tmp_path / "t.jsonl", ["b"], 5, 200),
        labels=("b", "a"),
    )
    dataset = load_dataset(spec)
    assert (len(dataset.train), len(dataset.held_out), len(dataset.test), dataset.labels) == (40, 10, 5, ("b", "a"))
    assert not dataset.leaks.across


def test_row_order_changes_nothing(tmp_path):
    first = load_dataset(DataSpec(train=write(tmp_path / "a.jsonl", ["a", "b"])))
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[::-1]))
    second = load_dataset(DataSpec(train=str(tmp_path / "b.jsonl")))
    assert [row.key for row in first.train] == [row.key for row in second.train]
    assert first.split_record() == second.split_record()


def test_held_out_file_that_is_the_training_file(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(DataError, match="All 40 held-out rows are training rows too"):
        load_dataset(DataSpec(train=path, held_out=path))


def test_one_label_only(tmp_path):
    with pytest.raises(DataError, match=r"All 36 training rows have the label 'a'; .*--data.label_column"):
        load_dataset(DataSpec(train=write(tmp_path / "a.jsonl", ["a"])))


def test_labels_unseen_in_training_are_all_named(tmp_path):
    spec = DataSpec(
        train=write(tmp_path / "a.jsonl", ["good", "bad"]),
        held_out=write(tmp_path / "h.jsonl", ["good", "goood"], 10, 100),
        test=write(tmp_path / "t.jsonl", ["odd"], 8, 200),
    )
    with pytest.raises(DataError) as caught:
        load_dataset(spec)
    message = str(caught.value)
    assert "2 problems" in message and "'goood' of 5 held-out rows (h.jsonl:2" in message and "Did you mean 'good'?" in message
    assert "'odd' of 8 test rows" in message and "and 3 more" in message


def test_named_label_that_no_training_row_has(tmp_path):
    rows = load_dataset(DataSpec(train=write(tmp_path / "a.jsonl", ["a", "b"]))).train
    with pytest.raises(DataError, match=r"No training row has the label 'c' of data.labels; the training rows have 'a', 'b'"):
        find_labels(rows, DataSpec(train="x", labels=("a", "b", "c")))


def test_rows_without_labels_need_none(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} words of text number {n * n}"}) + "\n" for n in range(20))
    )
    dataset = load_dataset(DataSpec(train=str(tmp_path / "a.jsonl")))
    assert dataset.labels == () and len(dataset.held_out) == 2
    check_labels({"held-out": dataset.held_out}, dataset.labels)


def test_wrong_settings_come_before_any_file(tmp_path):
    with pytest.raises(ConfigError, match=r"data.limit is 0"):
        load_dataset(DataSpec(train=str(tmp_path / "missing.jsonl"), limit=0))


def test_labels_that_look_alike_are_said(tmp_path: Path) -> None:
    labels = ("Positive", "positive", "negative")
    lines = ["text\tlabel", *(f"number {number} of it\t{labels[number % 3]}" for number in range(30))]
    (tmp_path / "rows.tsv").write_text("\n".join(lines))
    found = load_dataset(DataSpec(train=str(tmp_path / "rows.tsv"), held_out_fraction=0.3))
    assert any("count as several: 'Positive' and 'positive'. If they are one" in note for note in found.notes)
    assert set(found.label_counts) == set(labels) and sum(found.label_counts.values()) == len(found.train)


def prompts(template: str) -> list[Row]:
    return [
        Row((Turn("user", template.format(n), False), Turn("assistant", "ab"[n % 2], True)), "ab"[n % 2], None, f"r:{n}")
        for n in range(20)
    ]


def test_a_template_that_names_them_is_offered() -> None:
    said = unnamed_labels_note(prompts("Number {}"), ("net work", "bill"), "{text}", few_shot=True)
    assert said.startswith("The prompts do not name all 2 labels, so the base cannot know them") and "few-shot base sees" in said
    assert said.endswith(r"set data.template, for instance '{text}\nAnswer with one of: net work, bill'.")
    assert "few-shot" not in unnamed_labels_note(prompts("Number {}"), ("net", "bill"), "{text}", few_shot=False)


def test_the_template_names_every_label_or_none_is_offered() -> None:
    many = tuple(f"label {number}" for number in range(90))
    remedy = template_remedy(prompts("Number {}"), many, "{text}")
    assert remedy is not None and remedy.value.endswith(": " + ", ".join(many))
    assert repr(remedy.value) in unnamed_labels_note(prompts("Number {}"), many, "{text}", few_shot=False)
    longer = tuple(f"label {number}" for number in range(200))
    assert template_remedy(prompts("Number {}"), longer, "{text}") is None
    said = unnamed_labels_note(prompts("Number {}"), longer, "{text}", few_shot=False)
    assert said.startswith("The prompts do not name all 200 labels") and "more than 1,000 characters" in said


def test_a_label_that_the_template_leaves_out_is_said() -> None:
    labels = ("positive", "positve", "negative", "negatve")
    said = unnamed_labels_note(prompts("Number {}"), labels[:3], "{text}", few_shot=False, doubtful={"positve"})
    assert said.endswith("one of: positive, negative'. That leaves out 'positve', which may be a typo: is it? If not, add it.")
    said = unnamed_labels_note(prompts("Number {}"), labels, "{text}", few_shot=False, doubtful={"positve", "negatve"})
    assert said.endswith("That leaves out 'positve', 'negatve', which may be typos: are they? If not, add them.")
    named = prompts("Positive or negative? {}")
    said = unnamed_labels_note(named, labels[:3], "{text}", few_shot=False, doubtful={"positve"})
    assert said == "The prompts name all labels but 'positve': a typo? If it is meant, name it in data.template."


def test_a_complement_is_named_in_the_template(tmp_path: Path) -> None:
    rows = [f"number {number} of it\t{'complete' if number % 7 else 'incomplete'}" for number in range(70)]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]))
    found = load_dataset(DataSpec(train=str(tmp_path / "rows.tsv"), near_duplicates=0))
    remedy = template_remedy(found.train, found.labels, "{text}", found.doubtful)
    assert remedy is not None and remedy.value == "{text}\nAnswer with one of: complete, incomplete"


def test_braces_of_a_label_stay_letters_in_the_template() -> None:
    remedy = template_remedy(prompts("Number {}"), ("a{b}", "c"), "{text}")
    assert remedy is not None and template_fields(remedy.value) == ["text"]
    assert fill_template(remedy.value, {"text": "x"}, "text")[0] == "x\nAnswer with one of: a{b}, c"


def test_names_are_whole_words_in_every_prompt() -> None:
    labels = ("net", "bill")
    assert unnamed_labels_note(prompts("NET or Bill? Number {}"), labels, "{text}", few_shot=True) == ""
    assert unnamed_labels_note(prompts("nets or bill? Number {}"), labels, "{text}", few_shot=True) != ""
    some = [*prompts("net or bill? {}")[:3], *prompts("net? {}")[:3]]
    assert unnamed_labels_note(some, labels, "{text}", few_shot=True) != ""
    assert unnamed_labels_note(prompts("Number {}"), (), "{text}", few_shot=True) == "", "rows without labels"


def test_labels_are_read_as_others_by_the_setting_that_a_note_advises(tmp_path: Path) -> None:
    """What a note advises merges the labels, also those that it cannot write without JSON, after those that were renamed."""
    labels = {"Yes": 30, "yes": 4, "YES": 2, "No": 30, "a, b": 12, "A, B": 3}
    texts = (f"{words} {n}" for n, words in enumerate(("ash bay", "cup dew", "elm fog") * 40))
    rows = [{"text": next(texts), "label": label} for label, count in labels.items() for _ in range(count)]
    spec = DataSpec(train=str(write_rows(tmp_path / "rows.jsonl", rows)), near_duplicates=0.0)
    counts = load_dataset(spec).label_counts
    first, *others = merges({label: labels[label] for label in counts}, {})
    assert others == [] and load(DataSpec, {"train": "x", "rename_labels": first.value}, where="a flag").rename_labels == {
        "yes": "Yes", "YES": "Yes", "A, B": "a, b"
    }  # fmt: skip
    merged = replace(spec, rename_labels=json.loads(first.value))
    found = load_dataset(merged)
    assert found.labels == ("No", "Yes", "a, b") and not [note for note in found.notes if "differ in case" in note]
    assert merging({"Yes": "Y"}, {"yes": "Yes"}).value == "yes=Y,Yes=Y", "one after another"
    with pytest.raises(ConfigError, match="renames 'Yes', and another label to it"):
        replace(spec, rename_labels={"yes": "Yes", "Yes": "YES"}).validate()


def test_a_held_out_label_of_another_case_is_mended_by_one_setting(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"text": f"word {n} {n * 7}", "label": "YN"[n % 2]} for n in range(8)])
    held = write_rows(tmp_path / "held.jsonl", [{"text": "other", "label": "y"}])
    spec = DataSpec(train=str(train), held_out=str(held), rename_labels={"n": "N"})
    with pytest.raises(DataError, match=r"set --data.rename_labels n=N,y=Y") as caught:
        load_dataset(spec)
    (remedy,) = caught.value.remedies
    read = load(DataSpec, {"train": "x", "rename_labels": remedy.value}, where="a flag").rename_labels
    assert load_dataset(replace(spec, rename_labels=read)).held_out[0].label == "Y"
