"""`studio.taking`: each way out is a command of its own, says what is missing, and shows the certificate of what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakeet.cli.flags import SettingsCommand, option_flags
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import Certificate, Check
from lorakeet.studio import taking as module
from lorakeet.studio.jobs import Job
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import NotHere
from lorakeet.studio.taking import (
    QUANTS,
    WAYS,
    bytes_of,
    certificate_values,
    default_name,
    go_on_uncertified,
    job_values,
    jobs_of,
    last_line,
    wanted,
    ways_of,
    why_not,
)  # fmt: skip
from tiny.command_results import failed

PASSED = Certificate("run", (Check("logits", "a", "b", {"error": 0.1}, {"error": 0.2}, True),))


@pytest.fixture
def run(studio: Studio) -> Path:
    folder = studio.places.runs / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: package:tiny\ndata: rows.jsonl\n")
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "package:tiny"}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    PASSED.write(folder / "certificate.json")
    return folder


def made_job(studio: Studio, words: list[str], code: int | None = None, result: str = "") -> Job:
    job = studio.queue.add(words, title="One GGUF file")
    if code is not None:
        for name, text in (("alive", ""), ("code", str(code)), ("result", result)):
            (job.folder / name).write_text(text)
    return job


@pytest.mark.parametrize("key", ["merge", "gguf", "ollama", "mlx", "push"])
def test_the_words_are_the_commands_and_mean_its_options(studio: Studio, run: Path, key: str) -> None:
    found = wanted(studio.places, "mine", key, {"name": "me/mine", "private": "true"} if key == "push" else {})
    parameters, arguments = option_flags(type(found.options))
    command = SettingsCommand(found.verb, arguments=arguments, params=parameters)
    with command.make_context(found.verb, list(found.words[1:])) as context:
        for name, value in context.params.items():
            own = getattr(found.options, name, None)
            own = str(own).lower() if isinstance(own, bool) else own  # flags hold the word
            assert value is None or str(value).lower() == str(own).lower() or value == own or tuple(value) == own, name
    assert found.out is None or found.out.parent == studio.places.runs


def test_names_stay_among_the_runs_and_never_name_the_run(studio: Studio, run: Path) -> None:
    for name in ("../x", "a/b", ".x"):
        with pytest.raises(ConfigError, match="plain name"):
            wanted(studio.places, "mine", "merge", {"name": name})
    with pytest.raises(ConfigError, match="is the run itself"):
        wanted(studio.places, "mine", "merge", {"name": "mine"})
    with pytest.raises(ConfigError, match=r"quant is 'q9'"):
        wanted(studio.places, "mine", "gguf", {"quant": "q9"})
    with pytest.raises(NotHere):
        wanted(studio.places, "mine", "zip", {})
    assert default_name("mine", WAYS["gguf"], "q4_0") == "mine-q4_0.gguf" and default_name("mine", WAYS["mlx"], "") == "mine-mlx"


def test_what_is_missing_is_said(studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = wanted(studio.places, "mine", "gguf", {"quant": "q4_k_m"})
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install 'lorakeet[llama]'" in why_not(gguf)
    assert "lorakeet[hub]" in why_not(wanted(studio.places, "mine", "push", {}))
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert why_not(gguf) == "" == why_not(wanted(studio.places, "mine", "merge", {}))
    assert "OWNER/NAME" in why_not(wanted(studio.places, "mine", "push", {}))
    assert "OWNER/NAME" in why_not(wanted(studio.places, "mine", "push", {"name": "no owner"}))
    (studio.places.runs / "mine-q4_k_m.gguf").touch()
    assert why_not(gguf) == "mine-q4_k_m.gguf exists already and is never overwritten. Give another name."


def test_pictures_and_texts_have_their_own_ways(studio: Studio, run: Path) -> None:
    assert [way.key for way in ways_of(studio.places, "mine")] == ["merge", "gguf", "ollama", "mlx", "push"]
    (run / "config.yaml").write_text("kind: image\nmodel: m\ndata: photos\n")
    assert [way.key for way in ways_of(studio.places, "mine")] == ["kohya", "diffusers", "push"]
    (run / "adapter").rename(run / "gone")
    with pytest.raises(NotHere, match="has no adapter yet"):
        ways_of(studio.places, "mine")


def test_a_job_shows_what_was_written_and_its_certificate(studio: Studio, run: Path) -> None:
    out = studio.places.runs / "mine-q8_0.gguf"
    job = made_job(studio, list(wanted(studio.places, "mine", "gguf", {}).words), 0, "writing\r12 %\nWrote it\n")
    made_job(studio, ["finetune", str(run)])
    out.write_bytes(b"x" * 2000)
    PASSED.write(studio.places.runs / "mine-q8_0.certificate.json")
    assert jobs_of(studio.places, studio.queue, "mine") == [job] and job.out == out
    found = job_values(job)
    assert (found["state"], found["bytes"], found["certificate"]["passed"]) == ("done", 2000, True)
    assert found["certificate"]["checks"][0]["name"] == "logits" and found["use"][0][0] == f"llama-server -m {out}"
    assert found["use"][1][0] == f"lorakeet verify {run} --against {out}"
    assert last_line("writing\r12 %\n\n") == "12 %"


def test_a_job_that_failed_shows_the_commands_message(studio: Studio, run: Path) -> None:
    job = made_job(studio, ["merge", str(run), "--out", str(studio.places.runs / "m")], 2, failed("no space"))
    found = job_values(job)
    assert (found["state"], found["error"], found["use"], found["certificate"]) == ("failed", "no space", [], None)


def test_a_folder_keeps_its_certificate_inside(studio: Studio, run: Path) -> None:
    assert certificate_values(run) is not None and bytes_of(run / "adapter") > 100 and bytes_of(run / "none") == 0
    (run / "certificate.json").write_text(json.dumps({"passed": True}))
    assert certificate_values(run) is None, "a broken one is none"
    assert "q4_k_m" in QUANTS


def test_a_refused_content_is_shown_in_its_words_and_a_click_goes_on(studio: Studio, run: Path) -> None:
    """The click repeats the command with --uncertified, in a folder of its own, and is offered once."""
    said = failed("mine is not what its certificate was made for: tensor x has changed.", "content-differs-from-certificate")
    job = made_job(studio, ["predict", str(run), "--data=rows.csv", "--out", "{folder}/answers.csv"], 3, said)
    values = job_values(job)
    assert values["uncertified"] and "tensor x has changed" in values["error"]
    again = go_on_uncertified(studio.places, studio.queue, "mine", job.name)
    assert [*again.words] == ["predict", str(run), "--data=rows.csv", "--out", f"{again.folder}/answers.csv", "--uncertified"]
    assert again.folder != job.folder and not job_values(again)["uncertified"]
    for name, text in (("alive", ""), ("code", "3"), ("result", said)):
        (again.folder / name).write_text(text)
    assert not job_values(again)["uncertified"], "it was given already"
    with pytest.raises(NotHere):
        go_on_uncertified(studio.places, studio.queue, "mine", again.name)
