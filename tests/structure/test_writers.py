"""Files are written by one module: what the others write goes through it, or into a folder that it has made."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from structure.tree import called_name, named, nodes_of, source_files

TEMPORARY = {"mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile"}
WRITERS = {"write_text", "write_bytes", "tofile", *TEMPORARY}
MODE = re.compile(r"[rbt]*[wxa+][wxabt+]*")  # of a file that is opened for writing
RENAMES = {"os.rename", "os.replace", "os.link", "os.symlink", "os.open", "shutil.move", "shutil.copyfile", "shutil.copy"}
NAMES = {"open", *WRITERS, *(name.rpartition(".")[2] for name in RENAMES)}  # the last of each call that may be one
# What each file may do by itself, and why that is no artefact at a name that others know.
ALLOWED = {
    "api/artefacts.py": "TemporaryDirectory: gone when the answers are read",
    "api/in_memory_model.py": "TemporaryDirectory: gone when the tokenizer is hashed",
    "api/peft_bridge.py": "TemporaryDirectory: gone when PEFT or the adapter is made",
    "api/rows.py": "TemporaryDirectory: rows in memory, for this process",
    "cli/main.py": "os.open: of /dev/null",
    "data/predicted/written_records.py": "archive.open: a part of a zip file that disk.create has opened",
    "disk.py": "the one place",
    "exporting/gguf_model.py": "tofile: of an array that writes through the file it is given",
    "exporting/model_folder.py": "copies and changes a file inside a new output",
    "kernels/cpu/compile.py": "TemporaryDirectory: without a cache, for this process",
    "memory/measure.py": "write_text: of /proc/self/clear_refs",
    "memory/spill.py": "TemporaryFile: it has no name",
    "memory/store.py": "os.open: to read",
    "merging/checkpoint.py": "copies files into a new output",
    "models/files/gguf_dense.py": "TemporaryDirectory: gone when the model is read",
    "kinds/images/model/single_file.py": "TemporaryDirectory: gone when the model is loaded",
    "serve/adapter_store.py": "renames uploads inside the server's own folder",
    "studio/deleted.py": "renames whole folders of runs into the studio's own folder, and back",
    "train/durable.py": "renames folders that are whole",
    "verbs/doctor.py": "TemporaryFile: it has no name",
    "verification/same_file.py": "TemporaryDirectory: gone when the server has answered",
}


def writes(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """The calls among the nodes of a file that write, open for writing or rename, with their lines."""
    for node in nodes:
        if not isinstance(node, ast.Call) or (name := called_name(node)) not in NAMES:
            continue
        called = ast.unparse(node.func)
        given = [part.value for part in (*node.args, *(word.value for word in node.keywords)) if isinstance(part, ast.Constant)]
        opens = name == "open" and any(isinstance(mode, str) and MODE.fullmatch(mode) for mode in given)
        if opens or called in RENAMES or name in WRITERS:
            yield node.lineno, called


def test_files_are_written_in_one_place() -> None:
    found = {path: list(writes(nodes_of(path))) for path in source_files()}
    writing = {named(path).removeprefix("src/lorakeet/"): calls for path, calls in found.items() if calls}
    strays = [f"{path}:{line} {call}" for path, calls in writing.items() if path not in ALLOWED for line, call in calls]
    assert not strays, "write these with lorakeet.disk, so that they are whole or not there:\n" + "\n".join(strays)
    assert not (ALLOWED.keys() - writing.keys()), "these write no more"


def test_a_stray_writer_is_found(tmp_path: Path) -> None:
    lines = ["path.open('wb')", "open(path, 'a')", "path.write_text('x')", "os.replace(a, b)", "tempfile.mkstemp()"]
    assert [line for line, _ in writes(ast.walk(ast.parse("\n".join(lines))))] == [1, 2, 3, 4, 5]
    harmless = "path.open('rb')\nopen(path)\nRun.open(path)\ntext.replace('a', 'w')\n"
    assert not list(writes(ast.walk(ast.parse(harmless))))


# What each file may open by itself, and why no stranger has put a pipe or a device there.
READING = {
    "api/in_memory_model.py": "read_bytes: files that it has just written",
    "api/rows.py": "read_bytes: files that it has written",
    "config.py": "open: /dev/fd/N, a pipe of the user's own shell", "disk.py": "the one place",
    "exporting/model_folder.py": "open: a file that it has just written",
    "api/artefacts.py": "read_text: a file that it has just written", "models/nvidia.py": "read_text: of /proc/driver",
    "kinds/images/model/single_file.py": "read_bytes: of an installed package",
}  # fmt: skip
OF_THE_SYSTEM = re.compile(
    r"/proc|_STAT\b|_STATUS\b|_MAPS\b|root /|limit\.|INCLUDE|C_FILES|files\(|published|Image|image_module|archive"
)


def test_files_are_read_through_one_gate() -> None:
    """Reading a pipe never ends, a device gives bytes for ever: disk.open_regular refuses both, for every name."""
    strays = []
    for path in source_files():
        name = named(path).removeprefix("src/lorakeet/")
        for node in nodes_of(path):
            if not isinstance(node, ast.Call) or called_name(node) not in ("read_text", "read_bytes", "open") or name in READING:
                continue
            if called_name(node) != "open" and not (isinstance(node.func, ast.Attribute) and not node.args):
                continue
            text = ast.unparse(node)
            reads = called_name(node) != "open" or "'rb'" in text or "'r+b'" in text or ast.unparse(node.func) == "open"
            if reads and not OF_THE_SYSTEM.search(text):
                strays.append(f"{name}:{node.lineno} {text[:60]}")
    assert strays == []
