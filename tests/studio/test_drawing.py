"""`studio.drawing`: the command that draws at several strengths, and what it has drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.studio.drawing import STRENGTHS, draw_strengths, drawing_jobs, sample_bytes, samples_of
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import NotHere


@pytest.fixture
def run(studio: Studio) -> Path:
    folder = studio.places.runs / "pictures"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {path: m, device: cpu}\ndata: r\nkind: image\n")
    return folder


def test_each_strength_is_drawn_with_the_same_seed(studio: Studio, run: Path) -> None:
    job = draw_strengths(studio.places, studio.queue, "pictures", prompt=" a red\n box, by day ", seed="7", steps="2")
    words = list(job.words)
    assert words[:2] == ["generate", "--adapter"] and words[2] == f"it={run}" and job.device == "cpu"
    assert words.count("a red box, by day") == len(STRENGTHS) == words.count("--each") and words.count("--seed") == 1
    assert [words[at + 1] for at, word in enumerate(words) if word == "--each"][:2] == ["base", "it=0.25"]
    assert drawing_jobs(studio.places, studio.queue, "pictures") == [job] and samples_of(job) == []
    assert drawing_jobs(studio.places, studio.queue, "other") == []


def test_what_was_drawn_is_shown_by_strength_and_nothing_else(studio: Studio, run: Path) -> None:
    job = draw_strengths(studio.places, studio.queue, "pictures", prompt="x", seed="", steps="")
    out = Path(job.words[job.words.index("--out") + 1])
    out.mkdir(parents=True)
    listed = [{"file": "000.png", "mix": {"it": 1.5}}, {"file": "001.png", "mix": {}}, {"file": "../secret", "mix": {}}]
    (out / "pictures.json").write_text(json.dumps(listed))
    (out / "000.png").write_bytes(b"\x89PNG")
    (out.parent / "secret").write_text("x")
    assert [one.strength for one in samples_of(job)] == [0.0, 0.0, 1.5] and sample_bytes(job, "000.png") == b"\x89PNG"
    for file in ("../secret", "pictures.json", "gone.png"):
        with pytest.raises(NotHere):
            sample_bytes(job, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"prompt": " "}, "prompt is empty"), ({"seed": "x"}, "expected whole numbers"), ({"steps": "0"}, "--steps is 0")],
)
def test_what_cannot_be_drawn_is_refused_in_the_commands_words(
    studio: Studio, run: Path, change: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        draw_strengths(studio.places, studio.queue, "pictures", **{"prompt": "x", "seed": "0", "steps": "2", **change})
    assert studio.queue.jobs() == []
