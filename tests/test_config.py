"""`config`: the run file in YAML, from disk to `RunConfig` and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakeet.config import RunConfig, dump_yaml, read_run, read_yaml
from lorakeet.errors import ConfigError
from lorakeet.settings import fields_of, load

RUN = """
model: some/folder
data:
  train: rows.jsonl
  chat_template: off
lora: {rank: 4, alpha: 12, target_modules: [q_proj, v_proj], alpha_pattern: {'.*q_proj': 1e-3}}
train: {seed: 7}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "drug.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path, overrides: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_run(path, overrides)
    return str(caught.value)


def test_a_run_file_is_read_with_its_plain_values(tmp_path: Path) -> None:
    config = read_run(written(tmp_path, RUN))
    assert config.model.path == "some/folder" and config.data.train == "rows.jsonl" and config.train.seed == 7
    assert config.data.chat_template == "off", "off is text here, not false as in YAML 1.1"
    assert (config.lora.rank, config.lora.alpha, config.lora.alpha_pattern) == (4, 12.0, {".*q_proj": 1e-3})


@pytest.mark.parametrize("name", ["continue_from", "on_top_of"])
def test_pictures_do_not_begin_with_an_earlier_adapter(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"kind: image\nmodel: some/folder\ndata: pictures\nlora: {{{name}: runs/first}}\n")
    assert f"lora.{name} is runs/first, but kind is image" in complaint(path)


def test_a_start_that_is_measured_on_rows_is_not_for_pictures(tmp_path: Path) -> None:
    path = written(tmp_path, "kind: image\nmodel: some/folder\ndata: pictures\nlora: {start: gradient}\n")
    assert "lora.start gradient needs rows of text, but kind is image" in complaint(path)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = read_run(written(tmp_path, RUN), {"lora.rank": "8", "model": "other", "model.dtype": "float32", "data.test": "t"})
    assert (config.lora.rank, config.lora.alpha, config.model.path, config.model.dtype) == (8, 12.0, "other", "float32")
    assert config.data.test == "t" and config.data.train == "rows.jsonl"


def test_flags_alone_are_enough() -> None:
    assert read_run(None, {"model": "m", "data.train": "t"}).data.train == "t"


def test_a_section_that_is_no_spec_is_refused_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(model={"path": "some/folder"}, lora=None, data="rows.jsonl")  # type: ignore[arg-type]
    said = str(caught.value)
    assert "model is {'path': 'some/folder'}; expected a ModelSpec. Make one: from lorakeet.models.spec import ModelSpec" in said
    assert "then model=ModelSpec(path='some/folder')." in said and "then data=DataSpec(train='rows.jsonl')." in said
    assert "lora is None; expected a LoraSpec" in said


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_a_reference_that_an_objective_does_not_have_is_refused(tmp_path: Path, objective: str) -> None:
    said = complaint(written(tmp_path, RUN), {"train.objective": objective, "train.reference": "runs/sft"})
    assert f"train.reference is runs/sft, but train.objective {objective} compares with no reference. Leave it out" in said
    found = read_run(written(tmp_path, RUN), {"train.objective": "dpo", "train.reference": "runs/sft"})
    assert found.train.reference == "runs/sft"


def test_what_is_dumped_can_be_run_again(tmp_path: Path) -> None:
    config = read_run(written(tmp_path, RUN), {"data.separator": "\n\n", "data.template": "1e-3 {text} no", "out": "2026-01-01"})
    text = dump_yaml(config)
    assert read_run(written(tmp_path, text)) == config
    assert dump_yaml(read_run(written(tmp_path, text))) == text
    tops = [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    assert tops == list(dict.fromkeys(leaf.path.partition(".")[0] for leaf in fields_of(RunConfig)))
    assert "target_modules: [q_proj, v_proj]" in text


TEXTS = [
    "off", "1e-3", "007", "1_000", "2026-11-24", "1:30", "null", "true",
    "", "~", "0x1f", "é", "- a", ".5", "<<", "\n", "a\n b \nc", "\x07", "a: b #c",
]


@pytest.mark.parametrize("value", TEXTS)
def test_text_survives_yaml(tmp_path: Path, value: str) -> None:
    config = load(RunConfig, {"model": "m", "data": {"train": "t", "template": value + "{text}", "separator": value}}, where="x")
    again = read_run(written(tmp_path, dump_yaml(config)))
    assert again.data.separator == value and again == config


def test_every_problem_of_file_and_flags_is_listed_with_its_source(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\ndata: {train: t}\nlora: {rnak: 8, alpha: -1}\n")
    text = complaint(path, {"lora.dropout": "lots", "train.seed": "-1"})
    assert f"Unknown key 'lora.rnak' in {path}. Did you mean 'lora.rank'?" in text
    assert "lora.dropout (flag --lora.dropout) is 'lots' (text); expected a number." in text
    assert "train.seed is -1" in text


def test_model_and_rows_are_requested(tmp_path: Path) -> None:
    text = complaint(written(tmp_path, "out: there\n"))
    assert "model is missing" in text and "data.train is empty" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 4\nout: x\n", "is not valid YAML at line 2"),
        ("lora:\n  rank: 4\n  rank: 8\n", "at line 3, column 3: key 'rank' is given twice. Fix it there and run again."),
        ("- a\n- b\n", "holds ['a', 'b']; expected keys such as 'model: …'"),
        ("just words\n", "holds 'just words'"),
        ("a: !!python/object:os.system {}\n", "the tag !!python/object:os.system is not taken"),
        ("a: \x07\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_run_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(written(tmp_path, text))
    assert message in str(caught.value) and "drug.yaml" in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "does not exist" in complaint(tmp_path / "none.yaml")
    assert "is a folder" in complaint(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9t\xe9\n")
    assert "is not UTF-8 text (byte 7)" in complaint(tmp_path / "latin.yaml")
    assert read_yaml(written(tmp_path, "# nothing yet\n")) == {}


def test_the_yaml_package_itself_is_left_as_it_was() -> None:
    assert yaml.safe_load("a: off") == {"a": False}


@pytest.mark.parametrize(("removed", "value", "same"), [
    ({"model": {"kernels": "triton"}}, "triton", {"model": {"kernels": "torch"}}),
    ({"train": {"cuda_graphs": True}}, True, {"train": {"cuda_graphs": False}}),
])  # fmt: skip
def test_a_removed_setting_of_an_old_run_file_is_named_in_one_message(
    removed: dict[str, Any], value: object, same: dict[str, Any], tmp_path: Path
) -> None:
    """With the value that an earlier version had for what is done now, the file is still read."""
    file = tmp_path / "run.yaml"
    whole = {"model": {"path": "m"}, "data": "rows.jsonl"}
    ((section, settings),) = removed.items()
    file.write_text(dump_yaml({**whole, section: {**whole.get(section, {}), **settings}}))  # type: ignore[dict-item]
    with pytest.raises(ConfigError) as caught:
        read_run(file)
    assert caught.value.code == "setting-removed"
    assert caught.value.values == {"setting": f"{section}.{next(iter(settings))}", "value": value}
    file.write_text(dump_yaml({**whole, section: {**whole.get(section, {}), **same[section]}}))  # type: ignore[dict-item]
    assert read_run(file).model.path == "m"


def test_a_kind_that_is_unknown_is_one_problem(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: rows\nkind: sound\nwaves: {bits: 8}\n")
    with pytest.raises(ConfigError) as caught:
        read_run(file)
    assert caught.value.code == "kind-unknown" and caught.value.values == {"kind": "sound", "known": ["text", "image"]}
