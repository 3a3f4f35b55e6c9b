"""What a trained adapter became, opened to be compared with it: a merged folder, a GGUF file, a base with a GGUF adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from rich.console import Console
from torch import Tensor

from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.data.template import encoded, templated
from lorakeet.errors import ConfigError, one_message
from lorakeet.exporting.gguf_model import GgufTensors
from lorakeet.exporting.llama_cpp import PASS, LlamaCpp
from lorakeet.exporting.merged_tensors import MergedTensors, StoredTensor, compare_stored
from lorakeet.exporting.tolerances import F32, PRECISIONS, Allowed, allowed_for
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.formats.files.gguf_header import begins_as_gguf
from lorakeet.memory.mapped_files import releasing_pages
from lorakeet.merging.checkpoint import open_checkpoint
from lorakeet.models.generate.sample import sample
from lorakeet.models.inject import activate
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.by_peft import IN_PEFT
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.planning.check import ROWS_TOGETHER, SERVERS
from lorakeet.runs.open_adapter import Opened

Messages = Sequence[dict[str, str]]
BEGINNING = 0.002  # seconds between checks of a file that is being mapped (docs/log: 33 MiB of 442 are then there at most)


class Artefact(Protocol):
    """Something that should compute what base + adapter compute."""

    name: str
    allowed: Allowed

    def tokenise(self, text: str) -> list[int]:
        """The ids of a raw text, begin token included if the artefact adds one."""

    def prompt(self, messages: Messages) -> list[int] | None:
        """The ids of a conversation through the artefact's own chat template; None where it has none."""

    def logits(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        """The logits after each token, or after the `last` ones, (tokens, vocabulary), fp32."""

    def logit_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The logits after each token, PASS of them at a time; read to the end before any other call."""

    def greedy(self, prompt: Sequence[int], tokens: int, ends: frozenset[int]) -> list[int]:
        """The likeliest continuation, up to `tokens` or one of `ends`."""

    def stored(self, source: Path, opened: Opened) -> dict[str, StoredTensor]:
        """Every stored tensor against what it should be."""


@dataclass
class InTorch:
    """A model in torch: the live adapter on its base, or a merged folder."""

    text: TextModel
    adapter: str | None
    name: str
    allowed: Allowed = F32
    together: int = ROWS_TOGETHER  # tokens of rows that are computed at once; 0: each row alone
    bounded: bool = False  # by a memory budget, which leaves no memory for states that are kept

    def tokenise(self, text: str) -> list[int]:
        return [int(number) for number in encoded(self.text.tokenizer, text, add_special_tokens=True)]

    def prompt(self, messages: Messages) -> list[int] | None:
        tokenizer = self.text.tokenizer
        if not tokenizer.chat_template:
            return None
        text = templated(tokenizer, messages, add_generation_prompt=True)
        return [int(number) for number in encoded(tokenizer, text, add_special_tokens=False)]

    def logits(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        return torch.cat(list(self._parts(ids, len(ids) if last is None else last)))

    def logit_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """As the protocol says; calls may alternate with those of another side of the same model."""
        return self._parts(ids, len(ids))

    def logits_of_rows(self, rows: Sequence[Sequence[int]], lasts: Sequence[int] | None = None) -> Iterator[Tensor]:
        """What `logits` returns of each row and its last tokens; some rows are computed together."""
        tokens = [len(ids) for ids in rows] if lasts is None else list(lasts)
        start = 0
        while start < len(rows):
            end = start + 1
            while end < len(rows) and (end + 1 - start) * max(map(len, rows[start : end + 1])) < self.together:
                end += 1
            states = self._hidden(rows[start:end], tokens[start:end])
            for part in torch.split(states, tokens[start:end]):
                activate(self.text.model, self.adapter)
                yield self._table(part)
            start = end

    @torch.no_grad()
    def _hidden(self, rows: Sequence[Sequence[int]], lasts: Sequence[int]) -> Tensor:
        """The states (Σ lasts, hidden) after the last tokens; the last one is computed by letting the first token follow."""
        activate(self.text.model, self.adapter)
        self.text.model.eval()
        examples = []
        for ids, last in zip(rows, lasts, strict=True):
            array = np.array([*ids, ids[0]], np.int64)
            supervised = np.arange(len(array)) > len(ids) - last
            examples.append(Example(array, supervised, "row", None, False))
        return self.text.hidden(pack_examples(examples))

    def _parts(self, ids: Sequence[int], last: int) -> Iterator[Tensor]:
        for part in torch.split(self._hidden([ids], [last]), PASS):
            activate(self.text.model, self.adapter)  # another side of the model may have switched it
            yield self._table(part)  # under no name, which would keep it until the next one is there

    @torch.no_grad()
    def _table(self, hidden: Tensor) -> Tensor:
        return self.text.head(hidden).float().cpu()

    def greedy(self, prompt: Sequence[int], tokens: int, ends: frozenset[int]) -> list[int]:
        activate(self.text.model, self.adapter)
        written = sample(self.text, [list(prompt)], max_tokens=tokens, temperature=0.0)[0]
        return [int(number) for number in written]

    def stored(self, source: Path, opened: Opened) -> dict[str, StoredTensor]:
        self.text.release()
        folder = self.text.source
        held = open_checkpoint(folder)
        expected = MergedTensors(source, opened.adapter)
        names = {held.find(name) or name: name for name in expected.names}
        stored = ((names.get(name, name), held.shards[file].rows(name)) for name, file in held.home.items())
        return compare_stored(expected, stored)


@dataclass
class InLlamaCpp:
    """A GGUF model in llama.cpp; with `lora` a base and a GGUF adapter that is applied as it runs."""

    start: Callable[[], LlamaCpp]
    file: GgufFile
    name: str
    allowed: Allowed
    lora: Path | None = None

    @cached_property
    def engine(self) -> LlamaCpp:
        """llama.cpp with the model, started by its first call: weights are compared before it takes memory."""
        return self.start()

    def tokenise(self, text: str) -> list[int]:
        return self.engine.tokenise(text)

    def prompt(self, messages: Messages) -> list[int] | None:
        """As llama-server does: the file's template, from which a begin token is taken that llama.cpp adds itself."""
        template = self.file.value("tokenizer.chat_template")
        if template is None:
            return None
        tokens = self.file.value("tokenizer.ggml.tokens")
        marks = {key: self._token(tokens, key) for key in ("bos", "eos")}
        text = render_template(str(template), messages, bos=marks["bos"], eos=marks["eos"])
        started = self.engine.adds_bos and bool(marks["bos"])
        return self.engine.tokenise(text.removeprefix(marks["bos"]) if started else text)

    def _token(self, tokens: Sequence[str], key: str) -> str:
        number = self.file.value(f"tokenizer.ggml.{key}_token_id")
        return "" if number is None else str(tokens[int(number)])

    def logits(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        return self.engine.logits(ids, last)

    def logit_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        return self.engine.logit_parts(ids)

    def greedy(self, prompt: Sequence[int], tokens: int, ends: frozenset[int]) -> list[int]:
        return self.engine.greedy(prompt, tokens, ends)

    def stored(self, source: Path, opened: Opened) -> dict[str, StoredTensor]:
        if self.lora is None:
            return compare_stored(GgufTensors(source, opened.adapter), self.file.tensors())
        found = compare_stored(GgufTensors(source, None), self.file.tensors())
        theirs = gguf.read(self.lora, base=open_base(source))
        changes = _Changes({path: pair.delta() for path, pair in opened.adapter.pairs.items()})
        return found | compare_stored(changes, ((path, pair.delta()) for path, pair in theirs.pairs.items()))


@dataclass
class _Changes:
    """ΔW by module, as the change of a base of zeros: what a LoRA file should hold."""

    by_path: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.by_path)

    def changes(self, name: str) -> bool:
        return name in self.by_path

    def rows(self, name: str, *, folded: bool = True) -> Tensor:
        return self.by_path[name] if folded else torch.zeros_like(self.by_path[name])


def render_template(template: str, messages: Messages, *, bos: str, eos: str) -> str:
    """What a chat template in a GGUF file says, rendered as transformers renders it; nothing in it can reach this process."""

    def refuse(reason: str) -> str:
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    with one_message("The chat template in the file cannot be rendered", "It may be damaged: fetch it again.", ConfigError):
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token=bos, eos_token=eos
        )


_JOINED = " + "  # between a base and an adapter that is applied as it runs


def artefact_name(path: Path, beside: Path | None) -> str:
    """How checks call what is at `path`: from `beside` on where it is within, in full elsewhere; the last part without one."""
    if beside is None:
        return path.name
    whole, around = Path(os.path.abspath(path)), os.path.abspath(beside)
    return (whole.relative_to(around) if whole.is_relative_to(around) else whole).as_posix()


def is_there(name: str, beside: Path) -> bool:
    """Whether what `artefact_name` named is still on disk; true of a server, which need not answer now, and of PEFT's reading."""
    if name.startswith(SERVERS) or IN_PEFT in name or (beside / name).exists():
        return True
    return all((beside / part).exists() for part in name.split(_JOINED))


@contextmanager
def open_artefact(
    target: str, opened: Opened, *, base: Path | None, precision: str, console: Console, context: int, beside: Path | None = None
) -> Iterator[Artefact]:
    """The artefact at `target`: a merged folder, a GGUF model, or a GGUF adapter together with the GGUF model `base`.

    `precision` names the row of tolerances, auto takes it from what is stored; `beside` as in `artefact_name`. A model in torch
    keeps the budget as `opened` does. ConfigError for what is none of these.
    """
    path = Path(target)
    if path.is_dir() and (path / "model.gguf").is_file():
        lora = path / "adapter.gguf"
        base, path = (path / "model.gguf", lora) if lora.is_file() else (base, path / "model.gguf")
    if path.is_dir():
        name = f"{target if beside is None else artefact_name(path, beside)}/"
        with _merged(path, opened, console) as text:
            yield InTorch(text, None, name, _row(precision, _folder_types(path)), _together(opened))
        return
    if not path.is_file():
        said = f"--against {target} does not exist; expected a merged folder, a .gguf file or an http address."
        raise ConfigError(said, code="file-missing", values={"path": str(target)})
    if path.suffix.lower() != ".gguf" and not begins_as_gguf(path):
        raise ConfigError(f"--against {target} is no GGUF file; expected a merged folder, a .gguf file or an http address.")
    file, adapter = GgufFile(path), None
    name, types = artefact_name(path, beside), dict(file.types)
    if file.is_adapter:
        if base is None:
            raise ConfigError(f"{target} is an adapter; name the GGUF file of its base too: --base-gguf FILE.")
        adapter, path, file = path, base, GgufFile(base)
        name, types = f"{artefact_name(base, beside)}{_JOINED}{name}", {**file.types, **types}
    with ExitStack() as stack:

        def start() -> LlamaCpp:
            return stack.enter_context(_started(path, adapter, context, opened))

        yield InLlamaCpp(start, file, name, _row(precision, types), adapter)


@contextmanager
def _started(model: Path, adapter: Path | None, context: int, opened: Opened) -> Iterator[LlamaCpp]:
    """llama.cpp with its model; under a budget it makes no copy of the file, and the pages that it has read are released: also
    while it starts, when it reads the whole file at once, and may fail and remove its mapping."""
    if not opened.residency.budget:
        with LlamaCpp(model, adapter=adapter, context=context) as engine:
            yield engine
        return
    with ExitStack() as stack:
        with releasing_pages(model, interval=BEGINNING):
            engine = stack.enter_context(LlamaCpp(model, adapter=adapter, context=context, repack=False))
        stack.enter_context(releasing_pages(model, stays=True))
        yield engine


@contextmanager
def _merged(folder: Path, opened: Opened, console: Console) -> Iterator[TextModel]:
    """The model in `folder` in fp32; its store, where it has one, goes when the context ends."""
    residency = opened.residency
    store = None if residency.store is None else residency.store / "artefact"
    spec = ModelSpec(path=str(folder), dtype="float32", products="float32", device=opened.config.model.device)
    text = load_text_model(spec, say=console.print, store=store, slots=residency.way.slots)
    try:
        yield text
    finally:
        if text.streamed is not None and store is not None:
            text.streamed.stream.close()
            shutil.rmtree(store, ignore_errors=True)


def _row(precision: str, types: Any) -> Allowed:
    return allowed_for(types) if precision == "auto" else PRECISIONS[precision]


def _folder_types(folder: Path) -> dict[str, int]:
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F32"}
    counts: dict[str, int] = {}
    for file in open_checkpoint(folder).shards.values():
        for stored in file.tensors.values():
            if len(stored.shape) > 1:
                kind = names.get(str(stored.dtype).removeprefix("torch."), "F32")
                counts[kind] = counts.get(kind, 0) + int(torch.Size(stored.shape).numel())
    return counts


def live_side(opened: Opened, console: Console) -> InTorch:
    """The adapter on its base in fp32, with which everything is compared."""
    text, bounded = opened.text_model(console, dtype="float32"), bool(opened.residency.budget)
    return InTorch(text, "default", "live adapter", together=_together(opened), bounded=bounded)


def _together(opened: Opened) -> int:
    """Tokens of rows that are computed at once, as `size_of_check` plans them."""
    return ROWS_TOGETHER if opened.residency.way.longest is None else 0
