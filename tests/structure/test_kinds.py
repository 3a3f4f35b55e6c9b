"""Nothing outside of kinds/ names a kind of run, an objective, or a picture: what only one kind needs, it registers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from lorakeet.registry import declarations, objectives, shape_names
from structure.tree import SOURCE, named, nodes_of, source_files

OF_TEXT = "lorakeet.kinds.text"
HOMONYMS = {"text", "none"}  # a column and a modality; "no": as kinds they are found in comparisons only
RESERVED = {"SFT", "PREFERENCE", "IMAGE", "KTO", "DPO", "denoising_report"}
PART = re.compile(r"images?|pictures?|pixels?|diffusion|denois\w*|preferences?|sft|dpo|kto", re.IGNORECASE)
PROSE = re.compile(r"\b(pictures?|pixels?|denois\w+|diffusion|(image|preference)s? (run|model|kind)s?|images)\b", re.IGNORECASE)
MAYBE = re.compile(r"image|picture|pixel|diffusion|denois|preference|objective|lorakeet\.kinds|\bkind\b|sft|dpo|kto", re.I)

EXCEPTIONS = {  # file or folder below the package: what of it may stay, and why
    "registry.py": (r"string (preference|image|images)|\.objective", "the table of the own kinds, and the setting that it makes"),
    "__init__.py": (r"string Preference|module lorakeet\.kinds\.preference.*", "the public name of a section that a kind brings"),
    "formats/diffusion": (r".*", "adapter files of other programs: convert and merge read them without any run"),
    "formats/detect.py": (r"module .*", "the list of adapter formats, with those of formats/diffusion"),
    "formats/components.py": (r"(name|prose) .*", "module paths in those adapter files"),
    "formats/mlx.py": (r"(name|prose) .*", "the refusal of such an adapter, which mlx-lm cannot load"),
    "formats/peft/peft_config.py": (r"name of_image_model", "PEFT's task_type, which such an adapter lacks"),
    "serve/routes": (r"string images|prose images|\.kind == text", "fields of other programs' requests"),
    "studio/safety.py": (r"prose pictures", "what web pages embed"),
    "kernels/triton_support.py": (r"prose Images", "images of containers"),
}  # fmt: skip
# Verbs and pages that work on a text model alone import its room. The list may only become shorter.
ON_TEXT = {
    "studio/fitting.py", "studio/sizing.py", "verbs/compress.py", "verbs/deployment.py", "verbs/evaluate.py", "verbs/finetune.py",
    "verbs/merges/base_choice.py", "verbs/merges/into_packed.py", "verbs/merges/packing_steps.py", "verbs/predict.py",
    "verbs/tune.py",
}  # fmt: skip


@cache
def known_names() -> frozenset[str]:
    """Every registered kind, objective and shape of rows that kinds add, and the folders of kinds/."""
    folders = {path.name for path in (SOURCE / "kinds").iterdir() if path.is_dir()}
    return frozenset({*declarations(), *objectives(), *shape_names(), *folders} - {"__pycache__"})


def _identifiers(node: ast.AST) -> Iterator[str]:
    for field in ("id", "attr", "name", "arg", "asname"):
        if isinstance(value := getattr(node, field, None), str):
            yield value


def _compared(node: ast.Compare) -> Iterator[str]:
    """The kinds' names that `kind` or `….kind` is compared with."""
    sides = [node.left, *node.comparators]
    if any(getattr(side, "attr", getattr(side, "id", "")) == "kind" for side in sides):
        values = [inner for side in sides for inner in ast.walk(side) if isinstance(inner, ast.Constant)]
        yield from (f".kind == {one.value}" for one in values if one.value in declarations())


def breaches(nodes: Iterator[ast.AST] | tuple[ast.AST, ...]) -> Iterator[str]:
    """Each breach in a file's nodes: "module M", "string S", "name N", "prose WORD", ".objective" or ".kind == KIND"."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = [f"{module}.{one.name}" for one in node.names] if module == "lorakeet.kinds" else [module]
            yield from (f"module {found}" for one in inside for found in _of_kinds(one))
        elif isinstance(node, ast.Import):
            yield from (f"module {one.name}" for one in node.names if _of_kinds(one.name))
        elif isinstance(node, ast.Compare):
            yield from _compared(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _of_string(node.value)
        if isinstance(node, ast.Attribute) and node.attr == "objective":
            yield ".objective"
        for name in _identifiers(node):
            if name in RESERVED or any(PART.fullmatch(part) for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)):
                yield f"name {name}"


def _of_kinds(module: str) -> list[str]:
    """The module, if it is in the room of one kind, or a room of ours is called after one."""
    top, *rooms = module.split(".")
    of_one = rooms[:1] == ["kinds"] and rooms[1:2] not in ([], [""]) and (SOURCE / "kinds" / rooms[1]).is_dir()
    return [module] if top == "lorakeet" and (of_one or any(PART.fullmatch(room) for room in rooms)) else []


def _of_string(text: str) -> Iterator[str]:
    if text.lower() in known_names() - HOMONYMS:
        yield f"string {text}"
    elif text.startswith("lorakeet.kinds."):
        yield from (f"module {one}" for one in _of_kinds(text.partition(":")[0]))
    else:
        yield from (f"prose {found[0]}" for found in PROSE.finditer(text))


def allowed(place: str, breach: str) -> str:
    """The exception that covers this breach: its file or folder; empty without one."""
    if breach.startswith(f"module {OF_TEXT}") and place in ON_TEXT:
        return place
    fitting = [one for one in EXCEPTIONS if place == one or place.startswith(f"{one}/")]
    return next((one for one in fitting if re.fullmatch(EXCEPTIONS[one][0], breach)), "")


def _outside() -> Iterator[tuple[str, Path]]:
    for path in source_files():
        if not (place := named(path)).startswith("kinds/") and MAYBE.search(path.read_text(encoding="utf-8")):
            yield place, path


@pytest.mark.slow
def test_nothing_outside_of_kinds_names_a_kind_an_objective_or_a_picture() -> None:
    wrong, used = set[str](), set[str]()
    for place, path in _outside():
        for breach in breaches(nodes_of(path)):
            exception = allowed(place, breach)
            used.add(exception)
            if not exception:
                wrong.add(f"{place}: {breach}")
    assert not wrong, "\n".join(sorted(wrong))
    assert {*EXCEPTIONS, *ON_TEXT} - used == set(), "these exceptions are needed no more: take them out"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lorakeet.kinds.images.task import Task", "module lorakeet.kinds.images.task"),
        ("import lorakeet.kinds.preference.loss", "module lorakeet.kinds.preference.loss"),
        ("from lorakeet.kinds import text", "module lorakeet.kinds.text"),
        ("import lorakeet.formats.diffusion.kohya", "module lorakeet.formats.diffusion.kohya"),
        ("work = 'lorakeet.kinds.images.task:Task'", "module lorakeet.kinds.images.task"),
        ("if config.kind == 'text': pass", ".kind == text"), ("if kind in ('none', 'image'): pass", ".kind == image"),
        ("if config.train.objective: pass", ".objective"), ("row = 'kto'", "string kto"), ("chosen = SFT", "name SFT"),
        ("def read_image(path): pass", "name read_image"), ("class ImageRows: pass", "name ImageRows"),
        ("call(pixels=3)", "name pixels"), ("'''Draws pictures of a run.'''", "prose pictures"),
    ],
)  # fmt: skip
def test_a_breach_is_found(source: str, found: str) -> None:
    assert found in [*breaches(tuple(ast.walk(ast.parse(source))))]
    assert not allowed("train/loop.py", found)


@pytest.mark.parametrize(
    "source",
    [
        "from lorakeet.kinds.protocol import run_kind", "if pair.kind == 'experts': pass", "column = 'text'",
        "if config.declaration.text_model: pass", "mime = 'image/png'", "config.train.registered.answers",
    ],
)  # fmt: skip
def test_a_homonym_is_no_breach(source: str) -> None:
    assert not [*breaches(tuple(ast.walk(ast.parse(source))))]
