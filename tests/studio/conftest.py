"""A studio on an empty folder, and a client that is its browser after the first page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="starlette, of the extra lorakeet[studio], serves the pages")

from starlette.testclient import TestClient

from lorakeet.studio.app import make_studio, studio_app
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import Places
from lorakeet.studio.safety import csrf_of

ADDRESS = "http://127.0.0.1:8017"


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user's secrets."""
    place = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    return place


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    (tmp_path / "models").mkdir()
    found = make_studio(Places.of(tmp_path / "runs", (tmp_path / "models",)))
    yield found
    found.workbench.close()


@pytest.fixture
def stranger(studio: Studio) -> Iterator[TestClient]:
    """A client that was not given the token."""
    with TestClient(studio_app(studio), base_url=ADDRESS, follow_redirects=False) as client:
        yield client


@pytest.fixture
def browser(studio: Studio, stranger: TestClient) -> TestClient:
    """A client that opened the address with the token; every request has the Origin and the csrf token of its pages."""
    assert stranger.get(f"/?token={studio.token}").status_code == 200
    stranger.headers.update({"origin": ADDRESS, "x-csrf": csrf_of(studio.token)})
    return stranger
