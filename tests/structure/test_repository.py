"""The files around the package: map, reference page, commands, licence, and nothing of anybody's own machine."""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from lorakeet import __version__
from lorakeet.verbs.packages import QUICKSTART_PACKAGES
from structure.tree import ROOT, SOURCE, committed_files, named


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_map_of_files_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_files.py"))
    assert text_of("docs/reference/files.md") == made["page"](), "run: make docs"
    assert len(made["listed"]()) > 300 and all(made["summary"](path) for path in made["listed"]()), "a file says nothing"


def test_the_architecture_names_files_that_there_are() -> None:
    """Paths in code spans, below the package, below the folder before a slash list, or a pattern such as `<verb>.py`."""
    text = text_of("ARCHITECTURE.md")
    paths = {span for span in re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:/|\.py))`", text) if "/" in span.rstrip("/")}
    missing = [path for path in sorted(paths) if not (SOURCE / path).exists() and not list(SOURCE.rglob(path))]
    assert len(paths) > 30 and not missing, f"ARCHITECTURE.md names {', '.join(missing)}"


def test_triton_is_required_only_where_it_has_wheels() -> None:
    (line,) = re.findall(r'^  "(triton[^"]*)",', text_of("pyproject.toml"), re.MULTILINE)
    marker = Requirement(line).marker
    assert marker is not None
    places = {("linux", "x86_64"), ("linux", "aarch64"), ("linux", "ppc64le"), ("win32", "AMD64"), ("darwin", "arm64")}
    found = {place for place in places if marker.evaluate({"sys_platform": place[0], "platform_machine": place[1]})}
    assert found == {("linux", "x86_64"), ("linux", "aarch64")}


def test_the_reference_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))
    assert text_of("docs/reference/config.md") == made["page"](), "run: make docs"
    assert text_of("docs/reference/errors.md") == made["errors_page"](), "run: make docs"


def test_the_page_of_families_says_what_the_results_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_models.py"))
    assert text_of("docs/reference/models.md") == made["page"](), "run: make docs"
    outcomes = {"train": {"outcome": "passed", "detail": "3 pairs"}, "merge": {"outcome": "refused", "detail": "No."}}
    table = made["rows"]({"a": outcomes})
    assert table["trained"] == ["| a | ✓ | – | – | – | refused | – | – | – | – | – |"]
    assert table["said"] == ["| a | merge | refused | No. |"]


def test_the_readme_says_how_many_families_train() -> None:
    every = json.loads(text_of("tests/families/results.json"))["families"]
    found = {name: one for name, one in every.items() if "(" not in name}  # without variants of a type
    trained = {name: one for name, one in found.items() if one.get("train", {}).get("outcome") == "passed"}
    served = sum(one["serve"]["outcome"] == "passed" for one in trained.values())
    readme = " ".join(text_of("README.md").split())
    assert f"[{len(trained)} of {len(found)} model types](docs/reference/models.md)" in readme
    exported = sum(one["GGUF"]["outcome"] == "passed" for one in trained.values())
    assert f"{served} of them can be served, and {exported} exported to GGUF" in readme
    said = "llama mistral mixtral qwen2 qwen3_5 gemma gemma4 phi3 gpt_oss deepseek_v3 glm4 mamba2"
    assert set(said.split(" ")) <= set(trained)
    assert all(one[column]["outcome"] == "passed" for one in trained.values() for column in ("gradients", "PEFT"))
    assert [name for name, one in trained.items() if one["merge"]["outcome"] != "passed"] == ["step3p7"]
    assert "gradients, loading in PEFT and merging are right" in readme


def drawn_speed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))  # where the script finds its neighbours
    return runpy.run_path(str(ROOT / "docs" / "draw_speed.py"))


def test_the_page_on_speed_says_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    made, drawings = drawn_speed(monkeypatch)["page"]()
    assert text_of("docs/explain/speed.md") == made, "run: make docs"
    assert {path.name for path in (ROOT / "docs" / "explain").glob("speed*.svg")} == set(drawings), "run: make docs"
    for name, drawing in drawings.items():
        assert text_of(f"docs/explain/{name}") == drawing, f"{name}: run: make docs"


def test_the_page_on_speed_has_the_newest_result_of_each_processor_and_none_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = drawn_speed(monkeypatch)
    monkeypatch.setitem(script["newest"].__globals__, "RESULTS", tmp_path)
    page, drawings = script["page"]()
    assert "benchmarks/results/" not in page and "|" not in page and not drawings
    for number, (cpu, claim) in enumerate([("A", "growth"), ("A", "growth"), ("B", "growth"), ("C", "growth_quick")]):
        about = {"claim": claim, "machine": {"cpu": cpu}, "began": f"2026-01-0{number + 1}"}
        (tmp_path / f"{claim}.{number}.json").write_text(json.dumps(about), encoding="utf-8")
    assert [found["file"] for found in script["newest"]("growth")] == ["growth.2.json", "growth.1.json"]


def test_the_page_on_speed_says_whose_losses_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = drawn_speed(monkeypatch)["agreement"]
    row = {"what": "Ours", "largest_loss_difference": 0.02}
    other = {"what": "Top", "largest_loss_difference": None, "trains_otherwise": "trains less"}
    said = agreement({"losses_agree": True, "contenders": {"a": row, "b": other}})
    assert said.startswith("Losses agree at every step (largest gap to PEFT by hand in the same products: 0.020 nats). Not ")
    assert said.endswith("compared, since they train something else: Top.")
    assert "not compared" in agreement({"losses_agree": True, "contenders": {"b": other}})
    near, far = {**row, "allowed_loss_difference": 0.15}, {**row, "what": "Far", "largest_loss_difference": 0.16}
    said = agreement({"losses_agree": False, "contenders": {"a": near, "c": {**far, "allowed_loss_difference": 0.15}}})
    assert "do not agree" in said and said.endswith("0.160 nats; more than is allowed: Far).")


def test_points_of_growth_are_drawn_beside_their_law(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From what a process found: seconds and FLOPs by phase, of 100 tokens."""
    script = drawn_speed(monkeypatch)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = runpy.run_path(str(ROOT / "benchmarks" / "growth.py"))
    found = [{"tokens": 100, "seconds": {"step": [times, 9.0, times]}, "flops": {"step": times * 10**6}} for times in (1, 3)]
    found[1]["seconds"] = {"step": [6.0, 6.0]}
    points = bench["with_law"]([bench["point"](256 * (1 + number), one) for number, one in enumerate(found)])
    assert [(one["us"], one["law_us"], one["flops"]) for one in points] == [(1e4, 1e4, 1e4), (6e4, 3e4, 3e4)]
    machine = {"cpu": "A", "cores": 2, "load_average": 0}
    about = {"machine": machine, "products": "bfloat16", "tolerance": 1.25, "axes": {"length": points}}
    monkeypatch.setitem(script["growth"].__globals__, "newest", lambda claim: [{**about, "file": "growth.json"}])
    drawings: dict[str, str] = {}
    assert any("512: 2.00 times the law" in part for part in script["growth"](drawings)) and drawings


def test_the_page_says_what_attached_pairs_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """From what two rounds of processes found: seconds and losses of two uncounted steps and one counted."""
    script = drawn_speed(monkeypatch)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = runpy.run_path(str(ROOT / "benchmarks" / "attach_vs_peft.py"))
    ours = [{"seconds": [9.0, 9.0, took], "losses": [2.0]} for took in (0.5, 1.0)]
    theirs = [{"seconds": [9.0, 9.0, 2 * run["seconds"][2]], "losses": [2.0 + 1e-6]} for run in ours]
    found = bench["line"]({"lorakeet": ours, "peft": theirs}, 1, 32)
    assert found["faster"]["median"] == 2 and found["milliseconds"]["lorakeet"]["median"] == 750 and found["kept"]
    far = bench["line"]({"lorakeet": ours, "peft": [{**run, "losses": [2.00001]} for run in theirs]}, 1, 32)
    slow = bench["line"]({"lorakeet": theirs, "peft": ours}, 1, 32)
    assert not far["losses_agree"] and not far["kept"] and not slow["kept"]
    about = {"machine": {"cpu": "A", "cores": 2, "load_average": 0}, "file": "a.json", "rank": 8, "steps": 1}
    monkeypatch.setitem(script["attached"].__globals__, "newest", lambda _: [{**about, "lines": [one]} for one in (found, far)])
    title, said, table, other, _ = script["attached"]({})
    assert "Losses differ by at most 5e-07 of themselves" in said and "**do not agree**" in other and title.startswith("## ")
    assert table.endswith("| 1 row of 32 tokens | 750 (500 to 1,000) | 1,500 (1,000 to 2,000) | 2.00 (2.00 to 2.00) |")


def test_the_two_commands_of_the_readme_exist() -> None:
    readme, makefile = text_of("README.md"), text_of("Makefile")
    for target in ("quickstart", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}: install$", makefile, re.MULTILINE)
    for target in re.findall(r"(?:^|`)make (\w+)", readme + text_of("CONTRIBUTING.md"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_continuous_integration_runs_the_same_command() -> None:
    assert "make test" in text_of(".ci/run") and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_doctor_and_makefile_name_the_same_quickstart_packages() -> None:
    assert f"QUICKSTART := {' '.join(QUICKSTART_PACKAGES)}\n" in text_of("Makefile")


def test_licence_and_changelog_belong_to_this_version() -> None:
    assert "Apache License" in text_of("LICENSE") and 'license = "Apache-2.0"' in text_of("pyproject.toml")
    assert f'version = "{__version__}"' in text_of("pyproject.toml")
    assert re.search(rf"^## \[({re.escape(__version__)}|Unreleased)\]", text_of("CHANGELOG.md"), re.MULTILINE)


def test_no_file_names_a_folder_of_somebodys_own_machine() -> None:
    private = re.compile("/" + r"(home|Users|root|work)/\w")
    found = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and weights
        found += [f"{named(path)}: {match.group()}" for match in private.finditer(text)]
    assert not found, "\n".join(found)
