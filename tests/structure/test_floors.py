"""Imports run downwards only, and each big package has its one place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from structure.tree import ROOT, imported, named, source_files

# Where a package may be imported, as beginnings of paths below src/lorakeet; everywhere else it is refused.
PLACES: dict[str, tuple[str, ...]] = {
    "transformers": ("models/", "kinds/images/model/"),
    "tokenizers": ("models/", "kinds/images/model/"),
    "huggingface_hub": ("models/", "exporting/hub.py"),
    "diffusers": ("kinds/images/model/",),
    "bitsandbytes": ("quant/", "kernels/"),
    "triton": (),
    "gguf": ("formats/files/gguf_header.py", "quant/gguf.py"),
    "llama_cpp_py_sync": ("exporting/llama_cpp.py",),
    "peft": ("api/peft_bridge.py", "models/text/by_peft.py"),
    "trl": (),
    "accelerate": (),
    "click": ("cli/",),
    "yaml": ("config.py", "formats/files/yaml_mapping.py", "models/files/origin.py", "exporting/card.py",
             "exporting/published_readme.py"),
    "scipy": ("evaluate/", "kinds/preference/measure.py"),
    "sklearn": (),
    "regex": ("data/copies/words.py", "evaluate/reading/", "formats/peft/patterns.py"),
    "datasets": ("data/",),
    "pyarrow": ("data/",),
    "tensorboard": ("train/log.py",),
    "wandb": ("train/log.py",),
    "trackio": ("train/log.py",),
    "mlflow": ("train/log.py",),
    "optuna": ("kinds/text/tuning/trials.py", "verbs/tune.py"),
    "fastapi": ("serve/routes/", "studio/"),
    "uvicorn": ("serve/routes/", "studio/"),
    "starlette": ("serve/routes/", "studio/"),
    "llguidance": ("serve/grammar.py",),
}
# What answers `--help` and makes forms: no tensor library behind it.
LIGHT = ("setting.py", "settings.py", "config.py", "errors.py", "__init__.py", "__main__.py", "cli/", "verbs/options.py")


def test_imports_run_downwards_only() -> None:
    """In a process of its own: the linter's console keeps the output of whoever imports it first."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def misplaced(path: Path, places: dict[str, tuple[str, ...]]) -> list[str]:
    where = named(path)
    return [
        f"{where}:{line} imports {name}; its places: {', '.join(places[name.partition('.')[0]]) or 'tests and benchmarks'}"
        for name, line in imported(path)
        if name.partition(".")[0] in places and not where.startswith(places[name.partition(".")[0]])
    ]


def test_each_big_package_is_imported_in_its_place_only() -> None:
    found = [message for path in source_files() for message in misplaced(path, PLACES)]
    assert not found, "\n".join(found)


def test_a_misplaced_import_is_found(tmp_path: Path) -> None:
    file = Path(__file__)
    assert misplaced(file, {"subprocess": ("cli/",)}) and not misplaced(file, {"subprocess": ("tests/",)})


def test_what_answers_help_imports_no_tensors() -> None:
    light = [path for path in source_files() if named(path).startswith(LIGHT) or path.name == "spec.py"]
    found = [
        f"{named(path)}:{line} imports {name}"
        for path in light
        for name, line in imported(path)
        if name.partition(".")[0] in ("torch", "numpy", "transformers", "safetensors")
    ]
    assert len(light) >= 10 and not found, "\n".join(found)
