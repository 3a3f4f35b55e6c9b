"""Every flag that a message, a help text or a docstring names exists: in the verb that it is named for, or else in some verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from structure.test_docs import commands, flags_of
from structure.tree import SOURCE, named, parsed, source_files

FLAG = re.compile(r"(?<![\w-])--([a-z](?:[\w.-]*\w)?)")
FOREIGN = {  # flags of other programs, which no verb has
    "pip": "no-deps force-reinstall upgrade index-url editable python include exclude local-dir quiet",
    "torchrun": "nproc-per-node nnodes rdzv-backend rdzv-endpoint",
    "vLLM": "max-lora-rank lora-modules enable-lora max-loras max-cpu-loras served-model-name max-model-len runner",
    "SGLang": "lora-paths",
    "llama.cpp": "embeddings",
    "llama-gguf-split": "merge",
    "nvidia-smi": "query-gpu format",
}
OF_OTHERS = {flag for flags in FOREIGN.values() for flag in flags.split()}
FORMS = {"flag", "no-flag", "no"}  # in what is said of all flags


def texts_of(tree: ast.AST) -> Iterator[str]:
    """The texts of a file; what an f-string takes from elsewhere is a word of its own."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "spelt" and isinstance(node.args[0], ast.Constant):
            yield f"--{node.args[0].value}"


def lost(text: str, known: dict[str, set[str]], own: str | None = None) -> list[str]:
    """The flags that do not exist: of a command "VERB … --flag" in its verb; of others in `own` or a verb that the text names."""
    words = r"(?: (?!lorakeet\b)(?:--[\w.-]+|[A-Z…'{<][^\s;:]*|[\w=/.-]+(?= --)))+"
    command = re.compile(rf"\blorakeet ({'|'.join(known)})({words})|\b({'|'.join(known)})((?: --[\w.-]+)+)")
    found, every = list[str](), {flag for flags in known.values() for flag in flags}
    for one, behind, other, flags in command.findall(text):
        verb, used = one or other, FLAG.findall(behind or flags)
        found += [f"{verb} has no --{flag}" for flag in used if f"--{flag}" not in known[verb]]
    named_verbs = {verb for verb in known if re.search(rf"\b{verb}\b", text)} | ({own} if own else set())
    allowed = {flag for verb in named_verbs for flag in known[verb]} if own else every
    rest = FLAG.findall(command.sub(" ", text))
    return found + [f"{own or 'no verb'} --{flag}" for flag in rest if f"--{flag}" not in allowed]


def owner(path: Path, verbs: set[str]) -> str | None:
    """The verb whose file this is: nothing else speaks in it."""
    place = path.relative_to(SOURCE)
    return path.stem if place.parts[0] == "verbs" and len(place.parts) == 2 and path.stem in verbs else None


@pytest.mark.slow
def test_every_flag_that_the_program_names_exists() -> None:
    known = {name: flags_of(command) for name, command in commands().items()}
    checked, wrong = 0, []
    for path in source_files():
        for text in texts_of(parsed(path)):
            if flags := {*FLAG.findall(text)} - OF_OTHERS - FORMS:
                checked += len(flags)
                wrong += [f"{named(path)}: {one}" for one in lost(text, known, owner(path, {*known}))]
    wrong = [one for one in wrong if one.rpartition("--")[2] not in OF_OTHERS | FORMS]
    assert checked > 300 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Make it with lorakeet serve RUN --engine vllm.", []), ("lorakeet serve RUN --quant q4.", ["serve has no --quant"]),
        ("Go on with --out.", []), ("Go on with --oot.", ["no verb --oot"]),
        ("finetune --resume RUN, not merge --resume", ["merge has no --resume"]),
    ],
)  # fmt: skip
def test_a_flag_of_another_verb_is_found(text: str, found: list[str]) -> None:
    known = {"serve": {"--engine", "--out"}, "merge": {"--quant"}, "finetune": {"--resume"}}
    assert lost(text, known) == found
