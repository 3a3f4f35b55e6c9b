"""Calls load from stated folders only, keys from their part of them, and refusals tell nothing of other paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.serve.access import Caller
from lorakeet.serve.load_places import LoadPlaces

EVERYONE, ONE = Caller(), Caller("one", frozenset({"a", "b"}))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("in/a", "in/b/adapter", "in/c", "in/uploads/a@1", "in/uploads/c@1", "in/.incoming/x/a", "out/a", "given"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("in/a.safetensors", "in/c.gguf", "out/a/adapter_config.json"):
        (tmp_path / name).touch()
    return tmp_path


def refusal(places: LoadPlaces, caller: Caller, path: object) -> str:
    with pytest.raises(ConfigError) as refused:
        places.find(caller, str(path))
    return str(refused.value)


def test_only_stated_folders_count(tree: Path) -> None:
    places = LoadPlaces([tree / "in"], {"d": tree / "given"})
    for name in ("in/a", "in/c", "in/none", "in/c.gguf", "in/uploads/c@1", "given", "given/adapter"):
        assert places.find(EVERYONE, str(tree / name)) == tree / name
    (tree / "alias").symlink_to(tree / "in")
    assert places.find(EVERYONE, str(tree / "alias/a")) == tree / "in/a"


def test_a_refusal_is_the_same_for_what_is_there_and_what_is_not(tree: Path) -> None:
    places = LoadPlaces([tree / "in"])
    outside = (
        tree / "out/a", tree / "out/none", "/root", "/etc/passwd", "", "~no-user-of-that-name/x", "x\0y", tree / "in",
        f"{tree}/in/../out/a", tree / "in/.incoming/x/a", tree, "x" * 5000,
    )  # fmt: skip
    said = {refusal(places, EVERYONE, path) for path in outside}
    assert len(said) == 1 and str(tree) not in said.pop()
    assert refusal(LoadPlaces(), EVERYONE, tree / "in/a")


def test_a_key_loads_only_what_it_may_see(tree: Path) -> None:
    places = LoadPlaces([tree / "in"], {"c": tree / "given"})
    for name in ("in/a", "in/b/adapter", "in/a.safetensors", "in/uploads/a@1"):
        assert places.find(ONE, str(tree / name)) == tree / name
    others = ("in/c", "in/none", "in/c.gguf", "in/uploads/c@1", "in/uploads", "given")
    said = {refusal(places, ONE, tree / name) for name in others}
    assert len(said) == 1 and "of this key" in said.pop()


@pytest.mark.parametrize("where", ["in/a", "in/a/adapter"])
def test_links_that_lead_out_are_refused(tree: Path, where: str) -> None:
    places = LoadPlaces([tree / "in"])
    (tree / where).mkdir(exist_ok=True)
    (tree / where / "adapter_model.safetensors").symlink_to(tree / "in/c/file")
    assert places.find(EVERYONE, str(tree / "in/a")) == tree / "in/a"
    assert refusal(places, ONE, tree / "in/a"), "a link to the adapter of another key"
    (tree / where / "adapter_config.json").symlink_to(tree / "out/a/adapter_config.json")
    assert refusal(places, EVERYONE, tree / "in/a")
    (tree / "in/d").symlink_to(tree / "out/a")
    assert refusal(places, EVERYONE, tree / "in/d")
