"""Claim: `lorakeet verify --against` calls no right server wrong, and finds every planted fault, over real servers.

    python benchmarks/served_proof.py [--quick] [--run RUN …] [--until 23:30] [--lines FILE]

Models: four tiny families (two blocks, heads of 64, rows of 256, which 4-bit types and vLLM's CPU engine need), each with
adapters of several training seeds, and each finished --run, such as SmolLM2-135M's quickstart. Servers: lorakeet's own (float32,
bfloat16), llama.cpp's (f16, bf16, q8_0, q4_k_m merged; f16 with a LoRA file), and vLLM's (bfloat16, float16) where
LORAKEET_VLLM_PYTHON names its environment: one start for all adapters of a model. Each serving is a line of --lines: started
again, the program goes on where it ended. No timings: a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from time import process_time
from typing import Any

from contenders.mixed_cache import MixedCacheApi
from harness.llama_server import llama_server
from harness.machine import REPOSITORY, RESULTS, origin, write_result
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.exporting.llama_cpp import quantise
from lorakeet.exporting.tolerances import F16, FEW_BITS, PRECISIONS
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.peft import peft
from lorakeet.models.files.source import find_source
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.open_adapter import NAME, Opened, open_adapter
from lorakeet.runs.server_answer import open_answer, read_answer
from lorakeet.verbs.vllm.vllm_process import base_url, running_vllm, vllm_python
from lorakeet.verification.artefact import InTorch, live_side
from lorakeet.verification.diagnose import numbered_part
from lorakeet.verification.modules import MINUTES
from lorakeet.verification.probes import probes_of
from lorakeet.verification.server import Server, check_server

sys.path.insert(0, str(REPOSITORY / "tests"))
from tiny.models import save_tiny_llama
from tiny.runs import run, sentence, write_rows

from lorakeet.verbs.serve import Registry, Service, ServingModel, load_text_model  # isort: skip
from lorakeet.models.spec import ModelSpec  # isort: skip
from lorakeet.serve.engine import Engine  # isort: skip
from lorakeet.serve.load_places import LoadPlaces  # isort: skip
from tiny.site import Site  # isort: skip

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SEEDS = 7  # adapters of a family; 4 families, 7 seeds and 7 servings beside vLLM's are 196
WIDTH = 256  # of hidden states: rows of the 4-bit types have so many numbers
SIZES = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "head_dim": 64}
LABELS = ("A", "B", "C")
VLLM = ("vLLM bfloat16", "vLLM float16")
FORMS = (
    "ours float32", "ours bfloat16", "llama.cpp f16", "llama.cpp f16 + LoRA", "llama.cpp bf16", "llama.cpp q8_0",
    "llama.cpp q4_k_m", *VLLM,
)  # fmt: skip
FEWEST_BITS = "llama.cpp q4_k_m"
PRECISION = {"llama.cpp q8_0": "8-bit", FEWEST_BITS: "4-bit"}
ROUNDED_AWAY = "folded into 4 bits, in 4 bits again"
FAULTS = (
    "the base",
    "adapter of the checkpoint before", "scale off by 2 %", "alpha times 1.25", "one pair missing", "A of two layers swapped",
    "a block missing", "a kind missing", "two blocks swapped", "another adapter of the task",
    "prefix cache of another adapter", "another chat template", "BOS doubled", "a base in q4_k_m",
    ROUNDED_AWAY,
)  # fmt: skip
IN_VLLM = FAULTS[:10]  # those of adapters
SINGLE = ("one pair missing", "A of two layers swapped")  # which may be named under not proved
CONTEXT = 1024
AUTO = dict.fromkeys(("float16", "bfloat16"), ("auto",))


@dataclass
class Subject:
    """A finished run: what is proved of its servings."""

    name: str
    path: Path
    other: Path | None  # another run of the same task
    rows: int  # held-out rows that are compared
    context: int = CONTEXT
    modules: bool = True  # whether they are compared one by one

    @cached_property
    def opened(self) -> Opened:
        return open_adapter(self.path, say=lambda _: None)

    @cached_property
    def source(self) -> Path:
        return find_source(self.opened.config.model, lambda _: None)

    @cached_property
    def side(self) -> tuple[InTorch, Any]:
        """The live adapter, and the rows and prompts that are compared."""
        live = live_side(self.opened, Console(quiet=True))
        return live, probes_of(self.opened, self.opened.dataset, live, self.rows)

    @property
    def few_bits(self) -> bool:
        """Whether the base is a GGUF file: a small change of its weights is rounded away in as few bits. vLLM reads none."""
        return Path(self.source).suffix == ".gguf"

    def before(self) -> Adapter | None:
        """The adapter of the earliest checkpoint that is kept; None where there is one at most."""
        folders = sorted((self.path / "checkpoints").glob("step-*"))
        if len(folders) < 2:
            return None
        kept = load_file(folders[0] / "trained.safetensors")
        held = self.opened.adapter
        pairs = {path: replace(pair, A=kept[f"{path}.A"], B=kept[f"{path}.B"]) for path, pair in held.pairs.items()}
        return replace(held, pairs=pairs)

    def faulty(self, fault: str) -> Adapter | None:
        """The adapter that a server with the fault applies; None where this run has none."""
        held = self.opened.adapter
        paths = list(held.pairs)
        if fault == "adapter of the checkpoint before":
            return self.before()
        if fault == "another adapter of the task":
            return None if self.other is None else open_adapter(self.other, say=lambda _: None).adapter
        if fault.endswith("swapped"):
            return replace(held, pairs=swapped(held.pairs, self.wrong(fault), blocks="blocks" in fault))
        scale = {"the base": 0.0, "scale off by 2 %": 0.98, "alpha times 1.25": 1.25}.get(fault, 1.0)
        factors = dict.fromkeys(paths, scale) | dict.fromkeys(self.wrong(fault), 0.0)
        return replace(held, pairs={path: replace(pair, B=pair.B * factors[path]) for path, pair in held.pairs.items()})

    def wrong(self, fault: str) -> list[str]:
        """The modules that a fault of single ones, of blocks or of a kind is about."""
        paths = list(self.opened.adapter.pairs)
        middle = paths[len(paths) // 2]
        block, kind = numbered_part(middle), middle.rpartition(".")[2]
        blocks = list(dict.fromkeys(map(numbered_part, paths)))
        other = blocks[(blocks.index(block) + 1) % len(blocks)]
        wrong = {
            "one pair missing": [middle],
            "A of two layers swapped": [middle, middle.replace(block, other, 1)],
            "a block missing": [path for path in paths if numbered_part(path) == block],
            "a kind missing": [path for path in paths if path.endswith(f".{kind}")],
            "two blocks swapped": [path for path in paths if numbered_part(path) in (block, other)],
        }
        return wrong.get(fault, [])


def swapped(pairs: Mapping[str, Pair], wrong: Sequence[str], *, blocks: bool) -> dict[str, Pair]:
    """The pairs with A of `wrong` modules of two blocks in each other's place; of `blocks` also B."""
    first, second = dict.fromkeys(map(numbered_part, wrong))
    found = dict(pairs)
    for path in wrong:
        here, there = (first, second) if numbered_part(path) == first else (second, first)
        other = pairs[path.replace(here, there, 1)]
        found[path] = replace(pairs[path], A=other.A, B=other.B if blocks else pairs[path].B)
    return found


def proved(subject: Subject, server: Server, precision: str) -> dict[str, Any]:
    """The verdict on one serving."""
    live, probes = subject.side
    console, begun = Console(quiet=True), process_time()

    def in_format(name: str) -> InTorch:
        return InTorch(subject.opened.text_model(console, dtype="float32" if name in FEW_BITS else name), NAME, name)

    said = server.said_precision()
    if precision == "auto" and said:
        precision, server.allowed = said, PRECISIONS[said]
    formats = {name: in_format for name in ("float16", "bfloat16", *FEW_BITS) if precision in (name, *AUTO.get(name, ()))}
    found = check_server(live, server, probes, subject.opened.config.evaluate, formats, minutes=MINUTES if subject.modules else 0)
    failed = [check.name.rpartition(": ")[2] for check in found.checks if not check.passed]
    by_name = {check.name.rpartition(": ")[2]: check for check in found.checks}
    modules = found.modules[0] if found.modules else None
    spent = process_time() - begun  # without the server's, where that is another process
    result: dict[str, Any] = {"passed": not failed and not found.ended, "failed": failed, "ended": found.ended, "seconds": spent}
    told = by_name.get("log-probabilities")
    if told is not None:
        result |= {"mean_kl": told.measured["mean_kl"], "allowed_kl": told.tolerance["mean_kl"]}
    result["not checked"] = [f"{one.what}: {one.why}" for one in found.unchecked if "stored weights" not in one.what]
    if modules is not None:
        check, many = by_name["scale"], len(subject.opened.adapter.pairs)
        result |= {"active": len(modules.active), "of": many, "missing": list(modules.missing)}
        result |= {"proved": modules.proved and not failed, "groups seen": len(modules.seen), "power": modules.power}
        result |= {"groups not seen": modules.unseen, "not distinguished": list(modules.unclear)}
        result |= {"scale_error": check.measured["scale_error"], "scale_allowed": check.tolerance["scale_error"]}
        result["scale_seen"] = float(check.detail.split("A scale that is ")[1].split()[0])
    result["format"] = told.detail.split("rounding in ")[1].split()[0] if told and "rounding in " in told.detail else ""
    return result


@contextmanager
def ours(subject: Subject, adapter: Adapter, dtype: Any, folder: Path) -> Iterator[str]:
    """lorakeet's own server over the base, with this adapter."""
    peft.write(adapter, folder / "adapter")
    text = load_text_model(ModelSpec(path=str(subject.source), dtype=dtype))
    live = ServingModel(text)
    engine = Engine(text, live.selection, slots=2, context=min(subject.context, text.context or CONTEXT), chunk=256)
    engine.start()
    registry = Registry(live, engine, base="base", budget=None, changed=lambda: None)
    registry.register("mine", folder / "adapter")
    site = Site(Service(text, engine, registry, places=LoadPlaces((Path(gettempdir()),))))
    try:
        yield f"{site.url}#mine"
    finally:
        site.stop()
        engine.drain(timeout=0.0)


@contextmanager
def in_llama_cpp(
    subject: Subject,
    adapter: Adapter,
    form: str,
    folder: Path,
    *,
    template: Callable[[str, str], str] | None = None,
    base: str = "f16",
) -> Iterator[str]:
    """llama.cpp's server of the merged model, or of a base in the type `base` with a LoRA file."""
    tokenizer = load_tokenizer(subject.opened.tokenizer or subject.source)
    if template is not None:
        tokenizer.chat_template = template(tokenizer.chat_template, tokenizer.bos_token or "")
    apart, quant = form.endswith("LoRA"), form.split()[1]
    wide, model, lora = folder / "wide.gguf", folder / "model.gguf", folder / "lora.gguf"
    kind = base if apart else quant
    direct = kind if kind in ("bf16", "q8_0") else "f16"
    write_gguf(subject.source, None if apart else adapter, wide, tokenizer=tokenizer, quant=direct, facts={})
    if kind == direct:
        wide.rename(model)
    else:
        quantise(wide, model, kind)
    if apart:
        gguf.write(adapter, lora, base=open_base(subject.source))
    with llama_server(model, [lora] if apart else [], context=subject.context, scale=1.0) as (url, _):
        yield url


@contextmanager
def served(subject: Subject, form: str, fault: str, folder: Path) -> Iterator[Server | None]:
    """The server of one serving; None where this subject has no such fault."""
    allowed, held = F16 if form not in PRECISION else PRECISIONS[PRECISION[form]], subject.opened.adapter
    adapter = subject.faulty(fault) if fault else held
    if adapter is None:
        yield None
    elif fault == "prefix cache of another adapter":
        other = subject.faulty("another adapter of the task") or subject.before()
        if other is None:
            yield None
            return
        server = Server.__new__(Server)
        server.allowed, server.name = allowed, "http://mixed#right"
        text = load_text_model(ModelSpec(path=str(subject.source), dtype="float32"))
        server.api = MixedCacheApi(text, held, other)
        yield server
    elif form.startswith("ours"):
        with ours(subject, adapter, form.split()[1], folder) as url:
            yield Server(url, allowed)
    else:
        templates: dict[str, Callable[[str, str], str]] = {
            "another chat template": lambda text, _: text.replace("user", "human").replace("\\n", " "),
            "BOS doubled": lambda text, bos: bos + bos + text,
        }
        if fault in templates and load_tokenizer(subject.opened.tokenizer or subject.source).chat_template is None:
            yield None  # its rows go through no template
            return
        base = "q4_k_m" if fault == "a base in q4_k_m" else "f16"
        with in_llama_cpp(subject, adapter, form, folder, template=templates.get(fault), base=base) as url:
            yield Server(url, allowed)


def form_of(fault: str, planted: str) -> str:
    """The server in which a fault is planted: `planted`, but for those of another one."""
    elsewhere = {"a base in q4_k_m": "llama.cpp f16 + LoRA", "prefix cache of another adapter": "ours float32"}
    return {**elsewhere, ROUNDED_AWAY: FEWEST_BITS}.get(fault, planted)


def save_family(folder: Path, family: str) -> None:
    """A random model of `family` with two blocks of real widths, and its tokenizer; logits spread as in the narrow ones."""
    heads = {"num_attention_heads": WIDTH // 64, "num_key_value_heads": WIDTH // 128}
    window = {"sliding_window": None} if family == "mistral" else {}
    save_tiny_llama(folder, family=family, **SIZES, **heads, **window)
    path = folder / "model.safetensors"
    tensors = {name: value * (0.5 if value.dim() > 1 else 1) for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def short_reviews(count: int) -> list[dict[str, str]]:
    """Labelled texts of four words, each label of one token with a word of its own."""
    chance = random.Random(0)
    return [{"text": f"{sentence(chance, 3)} {LABELS[at % 3] * 3}", "label": LABELS[at % 3]} for at in range(count)]


def subjects(folder: Path, family: str, seeds: int, rows: int) -> list[Subject]:
    """Runs of a tiny family, trained now where they are not there, one seed after another."""
    base, model, before, found = folder / family, folder / family / "model", None, []
    if not (base / "rows.jsonl").exists():
        base.mkdir()
        save_family(model, family)
        write_rows(base / "rows.jsonl", short_reviews(240))
    for seed in range(seeds + 1):
        changes = {"train.seed": seed, "train.checkpoint_every": 3, "evaluate.answers": 0, "train.steps": 9}
        if not (base / f"run{seed}" / "certificate.json").exists():
            run(model, base / "rows.jsonl", base / f"run{seed}", changes)
        if before is not None:
            found.append(Subject(f"{family}, seed {seed - 1}", before, base / f"run{seed}", rows, 256))
        before = base / f"run{seed}"
    return found


@contextmanager
def vllm_of(source: Path, dtype: str, context: int, python: Path) -> Iterator[str]:
    """vLLM's CPU engine over a base, into which adapters may be loaded: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url = base_url("127.0.0.1", port)
    words = ["vllm", "serve", str(source), "--enable-lora", "--max-lora-rank", "64", "--max-cpu-loras", "16", "--enforce-eager"]
    words += ["--dtype", dtype, "--max-model-len", str(context), "--host", "127.0.0.1", "--port", str(port)]
    with running_vllm(python, words, url, loading=True):
        yield url


def prove_in_vllm(group: Sequence[Subject], form: str, faults: Sequence[str], lines: Lines, python: Path) -> None:
    """The servings of adapters over one base in vLLM that are not in `lines` yet; one start for all. Faults are in the first."""
    planted = [fault for fault in IN_VLLM if fault in faults]
    every = [(subject, fault) for number, subject in enumerate(group) for fault in ("", *(() if number else planted))]
    wanted = [(subject, fault) for subject, fault in every if not lines.has(subject.name, form, fault)]
    first = group[0]
    if lines.late or not wanted or first.few_bits:
        return
    with TemporaryDirectory() as folder, vllm_of(first.source, form.split()[1], first.context, python) as url:
        for number, (subject, fault) in enumerate(wanted):
            adapter = subject.faulty(fault) if fault else subject.opened.adapter
            if adapter is None or lines.late:
                continue
            path = Path(folder) / f"a{number}"
            peft.write(adapter, path)
            with open_answer(f"{url}/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path)}) as one:
                read_answer(one)
            result = proved(subject, Server(f"{url}#{path.name}", F16), "auto")
            lines.add(subject.name, form, fault, {**result, "wrong": subject.wrong(fault)})


def how_found(one: Mapping[str, Any]) -> str:
    """Whether a planted fault failed; of single modules also, whether all are named under not proved; else it is missed."""
    if one["failed"]:
        return "found"
    wrong, named = {*one.get("wrong", ())}, {*one.get("not distinguished", ()), *one.get("missing", ())}
    return "named" if one["fault"] in SINGLE and wrong and wrong <= named else "missed"


class Lines:
    """The servings that were proved, one a line."""

    def __init__(self, path: Path, until: str) -> None:
        self.path, self.until = path, until
        self.known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def late(self) -> bool:
        return bool(self.until) and datetime.now().strftime("%H:%M") >= self.until

    def has(self, model: str, form: str, fault: str) -> bool:
        return any((one["model"], one["server"], one["fault"]) == (model, form, fault) for one in self.known)

    def add(self, model: str, form: str, fault: str, result: dict[str, Any]) -> None:
        one = {"model": model, "server": form, "fault": fault, **result}
        self.known.append(one)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")
        print({key: one[key] for key in ("model", "server", "fault", "passed", "failed")}, flush=True)

    def summary(self) -> dict[str, Any]:
        right = [one for one in self.known if not one["fault"]]
        faults = [one for one in self.known if one["fault"]]
        by_server = Counter(one["server"] for one in right)
        tally = Counter((one["fault"], how_found(one)) for one in faults)
        planted = dict.fromkeys(one["fault"] for one in faults)
        return {
            "right servings": len(right),
            "right servings by server": dict(by_server),
            "right servings proved by blocks and kinds": sum(bool(one.get("proved")) for one in right),
            "processor seconds": [round(one.get("seconds", 0.0)) for one in self.known],
            "false alarms": [one for one in right if not one["passed"]],
            "modules of right servings called missing": sum(len(one.get("missing", ())) for one in right),
            "modules of right servings shown active": [sum(one.get(key, 0) for one in right) for key in ("active", "of")],
            "faults": {fault: {how: tally[fault, how] for how in ("found", "named", "missed")} for fault in planted},
        }


def prove(subject: Subject, lines: Lines, forms: Sequence[str], faults: Sequence[str], faulty: str) -> None:
    """All servings of one subject, but vLLM's, that are not in `lines` yet; faults in the server `faulty`."""
    here = [form for form in forms if form not in VLLM and not (subject.few_bits and form == FEWEST_BITS)]
    planted = [fault for fault in faults if subject.few_bits or fault != ROUNDED_AWAY]
    for form, fault in [*((one, "") for one in here), *((form_of(fault, faulty), fault) for fault in planted)]:
        if lines.late or lines.has(subject.name, form, fault):
            continue
        with TemporaryDirectory() as name, served(subject, form, fault, Path(name)) as server:
            if server is not None:
                result = proved(subject, server, PRECISION.get(form, "auto"))
                lines.add(subject.name, form, fault, {**result, "wrong": subject.wrong(fault)})


def groups(given: argparse.Namespace, folder: Path) -> Iterator[list[Subject]]:
    """Subjects over one base each: the first tiny family, the runs, and the other families."""
    seeds, families = (1, given.families[:1]) if given.quick else (given.seeds, given.families)
    for family in families[:1]:
        yield subjects(folder, family, seeds, given.rows)
    for path in given.run:
        other = path.with_name(f"{path.name}-other")
        yield [Subject(path.name, path, other if other.exists() else None, given.rows, modules=not given.plain)]
    for family in families[1:]:
        yield subjects(folder, family, seeds, given.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, action="append", default=[], help="a finished run that is served too; repeatable")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES, help="tiny families")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS, help="servings")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=FAULTS, help="planted in the first of a model")
    parser.add_argument("--planted", default="llama.cpp f16", choices=FORMS[:7], help="the server of faults, beside vLLM")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="adapters of each family")
    parser.add_argument("--rows", type=int, default=12, help="held-out rows of each serving that are compared")
    parser.add_argument("--plain", action="store_true", help="modules of the runs are not compared one by one")
    parser.add_argument("--quick", action="store_true", help="one adapter of one family")
    parser.add_argument("--until", default="", help="HH:MM of today, after which no serving is started")
    parser.add_argument("--lines", type=Path, default=Path("served_proof.jsonl"), help="a line for each serving; read first")
    parser.add_argument("--work", type=Path, help="where tiny models and runs are kept; else they are made anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    given = parser.parse_args(arguments)
    about, lines, python = origin(), Lines(given.lines, given.until), vllm_python()
    with TemporaryDirectory() as name:
        for group in groups(given, given.work or Path(name)):
            for number, subject in enumerate(group):
                prove(subject, lines, given.forms, () if number else given.faults, given.planted)
            for form in VLLM:
                if python is not None and form in given.forms:
                    prove_in_vllm(group, form, given.faults, lines, python)
            if lines.late:
                break
    found, claim = lines.summary(), "served_proof_quick" if given.quick else "served_proof"
    print(json.dumps({**found, "false alarms": len(found["false alarms"])}, indent=1))
    print(write_result(claim, {**found, "servings": lines.known}, seed=0, about=about, folder=given.results))
    missed = sum(counts["missed"] for counts in found["faults"].values())
    return 1 if found["false alarms"] or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
