"""What is said of a hub's answers, and names of repositories; the whole way is in tests/verbs/test_push."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed
from lorakeet.exporting import hub


@pytest.mark.parametrize("name", ["me/dates", "some-org/My.Model_2"])
def test_names_of_repositories(name: str) -> None:
    hub.require_repository_name(name)


@pytest.mark.parametrize("name", ["dates", "me/", "me/da tes", "a/b/c", "me/../x", "me/x--y", "me/x.git", "-a/b", "me/x-"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected OWNER/NAME"):
        hub.require_repository_name(name)


def test_files_are_compared_by_the_hash_that_the_hub_keeps(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    sha256 = hashlib.sha256(b"abc").hexdigest()
    blob = "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"  # git hash-object
    large = SimpleNamespace(path="a", lfs=SimpleNamespace(sha256=sha256), blob_id="x")
    held = [large, SimpleNamespace(path="b", lfs=None, blob_id=blob)]
    hub._compare({"a": tmp_path / "a", "b": b"abc"}, held, "me/x")
    for files in ({"a": b"abd"}, {"b": b"abd"}, {"c": b"abc"}):
        with pytest.raises(VerificationFailed, match=f"other bytes than were sent to me/x: {next(iter(files))}"):
            hub._compare(files, held, "me/x")


def test_faults_that_are_not_the_hubs_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="of our own"), hub._explained("me/x", "nothing was sent"):
        raise ValueError("of our own")
    for odd in (KeyError("oid"), json.JSONDecodeError("Expecting value", "<html>", 0), TypeError("no list")):
        said = pytest.raises(EnvironmentProblem, match=r"the hub gave an answer that cannot be read, \w+Error: ")
        with said, hub._explained("me/x", "y"):
            raise odd
    with pytest.raises(EnvironmentProblem, match="failed, nothing was sent: refused"), hub._explained("me/x", "nothing was sent"):
        raise ConnectionRefusedError("refused")
