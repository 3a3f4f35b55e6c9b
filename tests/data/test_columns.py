"""Parquet files and data-set folders give the same records as text files."""

import zipfile

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from lorakeet.data.columns import folder_records, hub_records, is_hub_id, parquet_records
from lorakeet.data.locate import locate_data
from lorakeet.errors import DataError, EnvironmentProblem

TABLE = {"text": ["good", "bad"], "label": [1, 0]}
RECORDS = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]


def test_parquet_file_and_zip_member(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(TABLE), path)
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.write(path, "rows.parquet")
    for name in (str(path), f"{tmp_path / 'rows.zip'}!rows.parquet"):
        found = list(parquet_records(locate_data(name)))
        assert [record.values for record in found] == RECORDS
        assert found[1].source == "rows.parquet:2"


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"rows.parquet cannot be read as Parquet"):
        list(parquet_records(locate_data(str(tmp_path / "rows.parquet"))))


def test_saved_data_set_with_names_for_its_labels(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict(TABLE, features=features).save_to_disk(str(tmp_path / "set"))
    found = [record.values for record in folder_records(tmp_path / "set", "")]
    assert found == [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]


def test_saved_splits_are_picked_by_name(tmp_path):
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict(TABLE), "dev": datasets.Dataset.from_dict({"text": ["x"]})})
    both.save_to_disk(str(tmp_path / "both"))
    assert [record.values for record in folder_records(tmp_path / "both", "train")] == RECORDS
    with pytest.raises(DataError, match=r"holds several splits; write '.*both#SPLIT' with one of: train, dev"):
        list(folder_records(tmp_path / "both", ""))
    with pytest.raises(DataError, match=r"no split 'trian'.*Did you mean 'train'"):
        list(folder_records(tmp_path / "both", "trian"))


def test_folder_without_a_data_set(tmp_path):
    with pytest.raises(DataError, match="a folder without a saved data set"):
        list(folder_records(tmp_path, ""))


def test_what_counts_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_hub_id("owner/name") and is_hub_id("owner/name-1.0#test") and is_hub_id("hub:squad")
    assert not is_hub_id("folder/name") and not is_hub_id("owner/rows.jsonl") and not is_hub_id("a/b/c") and not is_hub_id("x")


def test_hub_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match=r"'no-such-owner/no-such-set' \(split 'dev'\) could not be loaded.*local file"):
        list(hub_records("hub:no-such-owner/no-such-set#dev"))
