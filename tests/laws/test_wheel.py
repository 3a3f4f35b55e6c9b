"""The wheel, built from the sdist and installed outside the tree, does what the checkout does.

Its environment is new and has this wheel only; a .pth file leads to torch and the other packages of this environment, which
would take minutes to install again. What Lorakeet requires is read from the wheel's own metadata.
"""

from __future__ import annotations

import email
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lorakeet import __version__
from structure.tree import ROOT, committed_files

pytestmark = pytest.mark.slow
MOST_ADDED = 150 * 10**6  # bytes that an installation adds to torch and transformers


@dataclass(frozen=True)
class Built:
    """The two archives of a release, and an environment with the wheel in it."""

    wheel: Path
    sdist: Path
    environment: Path
    empty: Path  # where commands run

    def run(self, *words: str, command: Sequence[str] = ("lorakeet",)) -> subprocess.CompletedProcess[str]:
        """`lorakeet WORDS` of the wheel, or another command, in an empty folder and with a cache of its own."""
        given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAKEET"))}
        given |= {"LORAKEET_CACHE": str(self.empty / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        program = [str(self.environment / "bin" / command[0]), *command[1:], *words]
        return subprocess.run(program, cwd=self.empty, env=given, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    for name in ("build", "hatchling"):
        pytest.importorskip(name, reason=f"{name}, of the extra lorakeet[test], builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    [wheel], [sdist] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    venv.create(folder / "environment", with_pip=False)
    [packages] = (folder / "environment" / "lib").glob("python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    python = str(folder / "environment" / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=120)
    (folder / "empty").mkdir()
    return Built(wheel, sdist, folder / "environment", folder / "empty")


def test_the_wheel_has_every_file_of_the_package_and_the_sdist_every_file(built: Built) -> None:
    kept = {str(path.relative_to(ROOT)) for path in committed_files()}
    package = {name.removeprefix("src/") for name in kept if name.startswith("src/lorakeet/")}
    with zipfile.ZipFile(built.wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        same = [name for name in package & inside if archive.read(name) != (ROOT / "src" / name).read_bytes()]
    assert not same and inside == {*package, "lorakeet/examples/drug_reviews.yaml"}
    suffixes = {Path(name).suffix for name in inside}
    assert not {".c", ".h", ".j2", ".css", ".js", ".json", ".pyi"} - suffixes and "lorakeet/py.typed" in inside
    with tarfile.open(built.sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in kept if not name.startswith(".")} - shipped and "PKG-INFO" in shipped


def test_its_metadata_is_that_of_a_package_that_can_be_published(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        about = email.message_from_bytes(archive.read(f"lorakeet-{__version__}.dist-info/METADATA"))
        assert f"lorakeet-{__version__}.dist-info/licenses/LICENSE" in archive.namelist()
    assert (about["Version"], about["License-Expression"], about["Requires-Python"]) == (__version__, "Apache-2.0", ">=3.10")
    assert "Typing :: Typed" in about.get_all("Classifier", []) and about["Description-Content-Type"] == "text/markdown"
    page = str(about.get_payload())
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert page.startswith("# Lorakeet") and "lk.finetune(" in page and [link for link in links if "://" not in link] == []


def test_links_of_the_page_lead_to_the_source_once_it_has_an_address() -> None:
    pytest.importorskip("hatchling", reason="hatchling, of the extra lorakeet[test], builds the wheel")
    page = runpy.run_path(str(ROOT / "hatch_build.py"))["page"]
    text = "A [page](docs/a.md#part), [site](https://a.b/c), [limits](#limits).\n\n![picture](docs/p.png)\n"
    assert page(text) == "A page, [site](https://a.b/c), limits.\n\n"
    found = page(text, "https://host/lorakeet/")
    assert "[page](https://host/lorakeet/blob/main/docs/a.md#part)" in found
    assert "[limits](https://host/lorakeet/blob/main/README.md#limits)" in found
    assert "![picture](https://host/lorakeet/raw/main/docs/p.png)" in found


def test_the_installation_adds_little_to_torch_and_transformers(built: Built) -> None:
    """By the files that wheels bring; the bytecode that pip writes beside them is not counted."""
    with zipfile.ZipFile(built.wheel) as archive:
        lines = email.message_from_bytes(archive.read(f"lorakeet-{__version__}.dist-info/METADATA")).get_all("Requires-Dist", [])
        sizes = {"lorakeet": sum(entry.file_size for entry in archive.infolist())}
    for name in closure(names_of(lines)) - closure(["torch", "transformers"]):
        sizes[name] = sum(file.size or 0 for file in metadata.files(name) or ())
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(sizes.items(), key=lambda each: -each[1]))
    print(f"{total / 1e6:.1f} MB beside torch and transformers: {parts}")
    assert sizes["scipy"] > 10**7 and total <= MOST_ADDED, parts


def names_of(lines: list[str]) -> list[str]:
    """The names that are required without any extra."""
    needs = map(Requirement, lines)
    return [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def closure(names: list[str]) -> set[str]:
    """The packages with all that they require, in this environment."""
    found: set[str] = set()
    waiting = [name.lower().replace("_", "-") for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other.lower().replace("_", "-") for other in names_of(metadata.requires(name) or [])]
    return found


def test_its_command_says_its_version(built: Built) -> None:
    said = built.run("--version")
    assert (said.returncode, said.stdout.strip()) == (0, f"lorakeet, version {__version__}"), said.stderr


ALL = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
import lorakeet
from lorakeet.cli.main import main
found = {"file": lorakeet.__file__}
for name, words in json.loads(sys.argv[1]).items():
    with redirect_stdout(StringIO()) as said:
        code = main(words)
    found[name] = [code, said.getvalue()]
print(json.dumps(found))
"""


def test_it_compiles_its_kernels_and_plans(built: Built, tiny_llama_folder: Path) -> None:
    """In one process of its environment, which imports torch once: a check, a shape that it ships, and the quickstart.

    The quickstart is planned from the packages of its data, with a small model in place of the real one.
    """
    quick = ["--data.limit", "300", "--train.micro_tokens", "512", "--lora.rank", "4"]
    words = {
        "doctor": ["doctor", "--json"],
        "plan": ["plan", "--model", "HuggingFaceTB/SmolLM2-135M", "--tokens", "64", "--json"],
        "quickstart": ["quickstart", "--dry-run", "--model", str(tiny_llama_folder), *quick, "--json"],
    }
    ended = built.run(json.dumps(words), command=["python", "-c", ALL])
    assert ended.returncode == 0, ended.stderr + ended.stdout
    found = json.loads(ended.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(built.environment)
    findings = {one["name"]: one for one in json.loads(found["doctor"][1])["findings"]}
    assert findings["packages"]["good"] and findings["torch"]["good"]
    compiled = list((built.empty / "cache" / "native").glob("native-*.so"))
    assert compiled or "in C" not in findings["kernels"]["found"]
    assert found["plan"][0] == 0 and json.loads(found["plan"][1])["trained_parameters"] == 4_884_480, ended.stderr
    planned = json.loads(found["quickstart"][1])
    assert found["quickstart"][0] == 0 and planned["dry_run"] and planned["pairs"] == 14, ended.stderr
    assert not (built.empty / "runs").exists()


def test_text_is_fine_tuned_with_what_the_base_installation_brings(
    built: Built, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Packages of extras cannot be imported there: links lead to the required ones alone."""
    with zipfile.ZipFile(built.wheel) as archive:
        lines = email.message_from_bytes(archive.read(f"lorakeet-{__version__}.dist-info/METADATA")).get_all("Requires-Dist", [])
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in closure(names_of(lines)):
        for file in metadata.files(name) or ():
            top = Path(str(file.locate())).parents[len(file.parts) - 2] if len(file.parts) > 1 else Path(str(file.locate()))
            if file.parts[0] not in ("..", "__pycache__") and not (packages / file.parts[0]).exists():
                (packages / file.parts[0]).symlink_to(top)
    [pth] = (built.environment / "lib").glob("python*/site-packages/shared.pth")
    before = pth.read_text(encoding="utf-8")
    pth.write_text(str(packages), encoding="utf-8")
    try:
        rows, out = str(ROOT / "examples" / "data" / "dates.jsonl"), str(tmp_path / "run")
        quick = ["--train.steps", "2", "--lora.rank", "4", "--evaluate.resamples", "200", "--evaluate.answers", "4"]
        trained = built.run("finetune", "--model", str(tiny_llama_folder), "--data", rows, "--out", out, *quick)
    finally:
        pth.write_text(before, encoding="utf-8")
    assert trained.returncode == 0 and (tmp_path / "run" / "report.html").is_file(), trained.stderr + trained.stdout
    assert "since PEFT is not installed" in " ".join(trained.stdout.split())
