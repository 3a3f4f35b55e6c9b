"""Records what the program computes, and compares another state of the source with the record.

    python tests/golden/same_program.py record
    python tests/golden/same_program.py compare [--quick] [--words]

Everything goes through the command line, in processes of its own, and through files; with --quick these processes are forked from
one that has imported its libraries. No module of the package is named here, so that a move of modules leaves this file as it is.
Models are made by tests/tiny. `compare` prints each difference with the old and the new value. It exits with 0 where nothing
differs, with 1 where something does, and with 2 on another machine, where numbers are rounded in another way.

Bytes and numbers are compared exactly, but for two kinds. A plan counts what the process itself holds (the kind `runtime`, as the
system measures it), and this differs by one or two MiB from process to process: it is taken off every phase and every peak, and
compared with a tolerance. Refusals print a whole plan in MiB, with that part in it: these numbers have the same tolerance.
Texts are kept apart as words. They are shown where they differ, and count with --words only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_suffix(".json")
WORKER = ROOT / "tests" / "laws" / "command_worker.py"
NEAR = 24 << 20  # bytes by which the memory of a process may differ; 2 MiB were seen between equal processes
AT_ONCE = 2  # processes
SECONDS = 300  # after which one is taken to hang
PACKAGES = ("torch", "transformers", "diffusers", "safetensors", "numpy", "scipy", "scikit-learn", "bitsandbytes", "gguf")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # which decide what kernels run
SAME_MACHINE = ("cpu", "flags", "torch", "transformers")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "130", "LC_ALL": "C.UTF-8",
}  # fmt: skip
SEED = 0
WIDTHS: dict[str, int] = {  # heads of 64, rows that divide into blocks of 64: what the native kernels take
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}  # fmt: skip
MEDIUM: dict[str, int] = {  # large enough that a plan in MiB says something of its tensors
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
NARROW = ("--model.dtype", "bfloat16", "--model.products", "bfloat16")  # auto would measure which is faster
TEXT = (
    "--data", "rows.jsonl", *NARROW, "--lora.rank", "4", "--lora.alpha", "12", "--data.max_tokens", "120",
    "--train.batch_size", "8", "--train.learning_rate", "0.02", "--train.seed", str(SEED),
    "--evaluate.resamples", "200", "--evaluate.drift_texts", "4", "--evaluate.drift_tokens", "8",
)  # fmt: skip
IMAGE = (
    "--kind", "image", "--model", "sd", "--model.dtype", "float32", "--model.device", "cpu", "--lora.rank", "4",
    "--lora.alpha", "12", "--lora.target_modules", "attention", "--data.train", "photos", "--data.held_out_fraction", "0.4",
    "--images.cache", "latents", "--train.steps", "4", "--train.batch_size", "4", "--train.learning_rate", "5e-3",
    "--train.seed", str(SEED), "--evaluate.resamples", "300", "--diffusion.sample_steps", "2", "--diffusion.prompts", "red box",
    "--diffusion.held_out_timesteps", "4", "--diffusion.text_encoder", "true",
)  # fmt: skip
BASES = {  # of the four small runs
    "dense": ("--model", "dense"),
    "nf4": ("--model", "dense", "--model.quantize", "nf4"),
    "gptq": ("--model", "gptq"),
    "gguf": ("--model", "q4.gguf", "--model.quantize", "gguf"),
}
PACK = (
    "quantize", "dense", "--method", "gptq", "--group-size", "64", "--calibration", "rows.jsonl", "--calibration-rows", "8",
    "--out", "gptq",
)  # fmt: skip
KERNELS = {"native": "1", "torch": "0"}  # the values of LORAKEET_NATIVE
PLANS: dict[str, tuple[str, ...]] = {  # whose numbers --json prints to the byte
    "7B NF4 within 2 GiB": (
        "plan", "--model", "meta-llama/Llama-2-7b-hf", "--quantize", "nf4", "--rank", "16", "--tokens", "2048",
        "--memory.budget", "2GiB", *NARROW,
    ),
    "13B GPTQ within 3 GiB": ("plan", "--model", "13b-gptq", "--tokens", "1024", "--memory.budget", "3GiB", *NARROW),
    "quickstart": ("plan", "drug_reviews.yaml", "--memory.budget", "4GiB", *NARROW),
    "SDXL": (
        "plan", "--kind", "image", "--model", "stabilityai/stable-diffusion-xl-base-1.0", "--model.dtype", "bfloat16",
        "--memory.budget", "64GiB",
    ),
    "image run": ("finetune", *IMAGE, "--out", "planned", "--dry-run"),
    "image run within too little": ("plan", *IMAGE, "--memory.budget", "64MiB"),
}  # fmt: skip
REFUSED: dict[str, tuple[str, ...]] = {  # plans that only a refusal prints, in MiB
    "packed merge": ("merge", "medium-run", "--into", "packed", "--out", "refused-merge"),
    "quantize": ("quantize", "medium", "--method", "gptq", "--calibration", "rows.jsonl", "--out", "refused-quantize"),
    "evaluate": ("evaluate", "medium-run"),
}
LITTLE = 64 << 20  # bytes: a budget that none of these keeps
CONVERSIONS: dict[str, tuple[str, ...]] = {  # in this order: the last two read what others wrote
    "kohya": ("run-image", "kohya.safetensors", "--to", "kohya"),
    "diffusers": ("run-image", "diffusers.safetensors", "--to", "diffusers"),
    "gguf": ("run-dense-native", "adapter.gguf", "--to", "gguf", "--base", "dense"),
    "mlx": ("run-dense-native", "mlx", "--to", "mlx"),
    "peft": ("mlx", "peft", "--to", "peft"),
    "peft of an image model": ("kohya.safetensors", "peft-image", "--to", "peft"),
}
NOTES = (
    "exact: the same in every recording. near: memory of the process itself (runtime), which differs by some MiB from process to "
    "process; and what refusals print in MiB, which has it in it. Compared within near_tolerance_bytes.",
    "Under a budget the number of blocks in memory follows from that memory too. 7B NF4 keeps 3 blocks and 13B GPTQ 6 as long as "
    "the process takes at most 50 MB more than here, or 50 MB less.",
    "packed merge, quantize, evaluate: these verbs print their plan in MiB only, so a change below the tolerance is not seen.",
    "Of report.json and certificate.json these keys are left out: created, speed, memory, Versions, Machine, Kernels, and the "
    "certificate's digest of the report, which has all of these in it.",
    "After 13d22e2 on purpose: the plan of 7B counts replies to held-out prompts (phases judge and certify, not the peak); "
    "report.json has the floor of characters where cross-validation prefers it, suspect labels, scores of replies, the part that "
    "was evaluated.",
    "Recorded anew on purpose: plans of runs follow the lengths of the rows, and plans count the few-shot base's longer rows; an "
    "adapter of a .gguf base names that file in its metadata; report.json has the few-shot base, and intervals of the new tests; "
    "certificate.json has the check of the first pass.",
    "Since then on purpose: plans and report.json have the table of targets, by kind of module; certificate.json has the checks "
    "trained = saved = loaded and, of runs without a budget, the adapter in PEFT. The phase judge is called final eval; what the "
    "certificate unpacks counts the largest packed matrix, which lets plans of 7B NF4 and 13B GPTQ keep more blocks.",
    "Changed by hand on purpose, as all else was the same: a headline says ': −0.667' where something is worse, not 'by −0.667'.",
    "Since then on purpose: the places that a micro-batch reads are a tensor of the layout, some KiB in every plan; plans write "
    "less, since random states are kept only by models that draw; certificates have what was incomplete and the modules of a "
    "server. No byte of an adapter, a merge or an export changed.",
    "Since then on purpose: report.json has the base's note, and a share is better or worse only if the exact test shows it too "
    "(4 rows lost and none won show nothing); TF-IDF is Lorakeet's own, equal but for the last digits; an adapter in GGUF notes "
    "where the text part of its model is. No byte of another adapter, of a merge or of an export changed.",
    "Since b2306d53 on purpose: under a budget the plan counts the ids by which the host looks up embeddings, 16 KiB. These "
    "14 values were set by the printed comparison; all other 2,705 were equal.",
    "Since f7de814c on purpose: prompts that are replied to are laid out in arrays of the host, without pieces of their own, "
    "2 to 36 KiB less in plans of phases that write replies. These 12 values were set by the printed comparison; all other 2,707 "
    "were equal.",
    "On purpose, not recorded yet: report.json has the facts Training and Prompt format, and Model says how the base is "
    "stored and packed; plans have the list refused.",
)
DROPPED = {"created", "speed", "memory", "Versions", "Machine", "Kernels", "report"}  # keys of both: time, machine, digest
MEASURED = {"flops_per_second", "bytes_per_second", "seconds_at_least", "tokens_per_second_at_most", "training_seconds_at_least"}
PEAKS = {"peak", "planned", "streamed_least"}  # keys of a plan: bytes with the process in them
_SIZE = re.compile(r"([\d,]*\.?\d+) (GiB|MiB|GB|MB|kB|bytes)")
_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}


@dataclass(frozen=True)
class Workplace:
    """A folder in which commands run, so that every path in what they write is short and the same."""

    folder: Path

    def lorakeet(self, *arguments: str, native: str = "1", allowed: tuple[int, ...] = (0,)) -> Any:
        """What `lorakeet ARGUMENTS --json` prints, read as JSON; RuntimeError where its exit code is not among those allowed."""
        command = [sys.executable, "-m", "lorakeet", *arguments, "--json"]
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, **self.environment(native)}, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        if done.returncode not in allowed:
            end = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            raise RuntimeError(f"lorakeet {' '.join(arguments)} ends with {done.returncode}:\n{end}")
        return json.loads(done.stdout)

    def environment(self, native: str = "1") -> dict[str, str]:
        """The environment variables of its processes."""
        own = {"PYTHONPATH": str(ROOT / "src"), "LORAKEET_CACHE": str(self.folder / "cache"), "LORAKEET_NATIVE": native}
        return {**ENVIRONMENT, **own}

    def digest(self, name: str) -> str:
        """The sha256 of one file."""
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()

    def digests(self, name: str) -> dict[str, str]:
        """The sha256 of a file, or of each file of weights and adapter_config.json of a folder, by its path."""
        place = self.folder / name
        kept = (".safetensors", ".gguf", "adapter_config.json")
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.name.endswith(kept))
        names = [str(path.relative_to(self.folder)) for path in files]
        return {each: self.digest(each) for each in names}


@contextmanager
def workplace() -> Iterator[Workplace]:
    """A new one, for as long as the context lasts.

    Its cache is empty, since a plan depends on what is unpacked already; only compiled kernels are those of the user's cache.
    """
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    from tiny.caches import new_cache

    with tempfile.TemporaryDirectory(prefix="same-program-") as name:
        new_cache(Path(name) / "cache")
        yield Workplace(Path(name))


def all_of(work: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The results of some work by name; two at a time are done."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = {name: pool.submit(each) for name, each in work.items()}
        return {name: each.result() for name, each in waiting.items()}


# What the commands read


def make_text_bases(place: Workplace) -> None:
    """The dense base, the GGUF base and the rows."""
    from tiny.gguf_file import write_tiny_gguf
    from tiny.models import save_tiny_llama

    save_tiny_llama(place.folder / "dense", seed=SEED, **WIDTHS)
    write_tiny_gguf(place.folder / "q4.gguf", "Q4_0", seed=SEED, **WIDTHS)
    chance, labels = random.Random(SEED), ("good", "bad", "so so")
    words = ("alder", "birch", "cedar", "daisy", "elder", "fern", "grass", "holly", "iris")
    rows = [(" ".join(chance.choice(words) for _ in range(8)), labels[number % 3]) for number in range(60)]
    lines = [json.dumps({"text": f"{text} {label.upper()}", "label": label}) + "\n" for text, label in rows]
    (place.folder / "rows.jsonl").write_text("".join(lines))


def make_others(place: Workplace) -> None:
    """What the plans, the image run and the merges read besides."""
    from tiny.models import save_tiny_llama
    from tiny.pictures import album
    from tiny.pipelines import save_tiny_sd

    save_tiny_llama(place.folder / "medium", seed=SEED, **MEDIUM)
    save_tiny_sd(place.folder / "sd")
    album(place.folder / "photos", 20)
    (place.folder / "drug_reviews.yaml").write_bytes((ROOT / "examples" / "drug_reviews.yaml").read_bytes())
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 5120,
        "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq",
        },
    }  # fmt: skip
    (place.folder / "13b-gptq").mkdir()
    (place.folder / "13b-gptq" / "config.json").write_text(json.dumps(shape))


def pack(place: Workplace) -> None:
    """The GPTQ base, by the program itself."""
    place.lorakeet(*PACK)


# What is recorded


def small_run(base: str, kernels: str) -> tuple[str, ...]:
    """The arguments of a small run."""
    return ("finetune", *BASES[base], *TEXT, "--train.steps", "6", "--out", f"run-{base}-{kernels}")


def run_of(place: Workplace, base: str, kernels: str) -> Callable[[], Any]:
    """A small run, to be started."""
    return lambda: place.lorakeet(*small_run(base, kernels), native=KERNELS[kernels])


def adapter_of(base: str, kernels: str) -> str:
    """The file of its adapter."""
    return f"run-{base}-{kernels}/adapter/adapter_model.safetensors"


def small_runs(place: Workplace, kernels: tuple[str, ...]) -> tuple[dict[str, str], dict[str, Any]]:
    """The hashes of the adapters of the four runs with these kernels, and what the runs printed."""
    names = [(base, which) for which in kernels for base in BASES]
    printed = all_of({f"{base} {which}": run_of(place, base, which) for base, which in names})
    return {f"{base} {which}": place.digest(adapter_of(base, which)) for base, which in names}, printed


def refusal(place: Workplace, *arguments: str) -> dict[str, Any]:
    """The sizes that a refusal names, without the budget, from the least; and its words, without numbers."""
    message = place.lorakeet(*arguments, "--memory", f"{LITTLE >> 20}MiB", allowed=(2,))["error"]["message"]
    sizes = [int(float(number.replace(",", "")) * _UNITS[unit]) for number, unit in _SIZE.findall(message)]
    near = {f"/size {number}": size for number, size in enumerate(sorted(size for size in sizes if size != LITTLE))}
    return {"exact": {"/sizes": len(near)}, "near": near, "words": {"/message": re.sub(r"\d+", "#", message)}}


def make_medium(place: Workplace) -> None:
    """A base in NF4 and a run of one step on it, for what is refused."""
    place.lorakeet("quantize", "medium", "--method", "nf4", "--out", "medium-nf4")
    place.lorakeet("finetune", "--model", "medium-nf4", *TEXT, "--train.steps", "1", "--out", "medium-run")


def merges(place: Workplace) -> dict[str, Callable[[], Any]]:
    """The merges, to be started: dense, and packed in GPTQ and GGUF. Whether enough of the gain is left is not asked."""
    packed = ("--into", "packed", "--keep", "0.0001", "--calibration-rows", "8")
    return {
        "merged": lambda: place.lorakeet("merge", "run-dense-native", "--out", "merged"),
        "packed": lambda: place.lorakeet("merge", "run-gptq-native", *packed, "--out", "packed", allowed=(0, 3)),
        "packed.gguf": lambda: place.lorakeet("merge", "run-gguf-native", *packed, "--out", "packed.gguf", allowed=(0, 3)),
    }


def conversions(place: Workplace) -> None:
    """An adapter in each of the five formats."""
    for arguments in CONVERSIONS.values():
        place.lorakeet("convert", *arguments)


def recorded(place: Workplace) -> dict[str, Any]:
    """Everything."""
    make_text_bases(place)
    make_others(place)
    pack(place)
    inputs = ("dense/model.safetensors", "q4.gguf", "rows.jsonl", "medium/model.safetensors", "sd/unet", "photos/000.png")
    found: dict[str, Any] = {"inputs": {name: digest for each in inputs for name, digest in place.digests(each).items()}}
    planned = all_of({
        **{name: (lambda flags=flags: split_plan(place.lorakeet(*flags, allowed=(0, 2)))) for name, flags in PLANS.items()},
        "medium": lambda: make_medium(place),
        "image": lambda: place.lorakeet("finetune", *IMAGE, "--out", "run-image"),
    })  # fmt: skip
    found["plans"] = {name: planned[name] for name in PLANS}
    found["adapters"], printed = small_runs(place, ("native", "torch"))
    found["plans"] |= {f"run {name}": split_plan(printed[name]["memory"]) for name in printed if name.endswith("native")}
    found["plans"] |= all_of({name: (lambda flags=flags: refusal(place, *flags)) for name, flags in REFUSED.items()})
    all_of({**merges(place), "conversions": lambda: conversions(place)})
    written = ["gptq", "medium-nf4", "run-image/adapter", *merges(place), *(flags[1] for flags in CONVERSIONS.values())]
    found["bytes"] = {name: digest for each in written for name, digest in place.digests(each).items()}
    found["values"], found["words"] = {}, {}
    for name in ("report.json", "certificate.json"):
        tree = json.loads((place.folder / "run-dense-native" / name).read_text())
        flat = {path: value for path, value in leaves(tree) if not DROPPED.intersection(path.split("/"))}
        found["values"][name] = {path: value for path, value in flat.items() if not isinstance(value, str)}
        found["words"][name] = {path: value for path, value in flat.items() if isinstance(value, str)}
    return found


def quickly_recorded(place: Workplace) -> dict[str, Any]:
    """The hashes of the four adapters that the native kernels make."""
    make_text_bases(place)
    from tiny.forked import forking

    with forking(WORKER, folder=place.folder, **place.environment()) as workers:
        for words in (PACK, *(small_run(base, "native") for base in BASES)):
            workers.start(words=words)
            if (ended := workers.end())["code"] != 0:
                raise RuntimeError(f"lorakeet {' '.join(words)} ends with {ended['code']}:\n{ended['said'][-2000:]}")
    return {"adapters": {f"{base} native": place.digest(adapter_of(base, "native")) for base in BASES}}


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON tree that is no list and no object, or an empty one, with its path."""
    if isinstance(tree, (dict, list)) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{str(key).replace('/', '|')}")
    else:
        yield path, tree


def split_plan(plan: Any) -> dict[str, Any]:
    """The numbers of a plan that are compared exactly, those of the process itself, and the words.

    What the process holds is taken off the bytes of each phase; off a peak, what it holds in the phase that has the peak.
    """
    flat = dict(leaves(plan))
    runtime = {path.removesuffix("/kinds/runtime"): value for path, value in flat.items() if path.endswith("/kinds/runtime")}
    at_peak = {flat[f"{path}/bytes"]: value for path, value in reversed(runtime.items())}
    usual = next(iter(runtime.values()))
    found: dict[str, Any] = {"exact": {}, "near": {}, "words": {}}
    for path, value in flat.items():
        phase, _, key = path.rpartition("/")
        if key in MEASURED:
            continue
        if isinstance(value, str):
            found["words"][path] = value
        elif key == "runtime":
            found["near"][path] = value
        elif key == "bytes" and phase in runtime:
            found["exact"][path] = value - runtime[phase]
        elif key in PEAKS and value is not None:
            found["exact"][path] = value - at_peak.get(value, usual)
        else:
            found["exact"][path] = value
    return found


# The machine, and the comparison


def machine() -> dict[str, Any]:
    """What the bytes depend on besides the source."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if sys.platform == "linux" else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    number = " ".join(f"{key} {said.get(key, '?')}" for key in ("cpu family", "model", "stepping"))
    cpu = f"{said.get('model name', platform.processor())}, {number}"  # one name is that of several kinds
    flags = [flag for flag in CPU_FLAGS if flag in said.get("flags", "").split()]
    versions = {name: _version(name) for name in PACKAGES}
    gcc = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    return {"cpu": cpu, "flags": flags, "cores": os.cpu_count(), "python": platform.python_version(), "gcc": gcc, **versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit of this checkout, with a star where files of src differ from it."""
    told = [
        subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "src"))
    ]
    return told[0] + "*" * bool(told[1])


def differences(old: Any, new: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """Each path at which two records differ with both values, and how it is compared: exact, near or words."""
    before, after = dict(leaves(old)), dict(leaves(new))
    for path in sorted({*before, *after}):
        left, right = before.get(path, "(none)"), after.get(path, "(none)")
        parts = path.split("/")
        kind = "words" if "words" in parts else "near" if parts[1] == "plans" and parts[3] == "near" else "exact"
        if left == right and type(left) is type(right):
            continue
        if kind == "near" and isinstance(left, int) and isinstance(right, int) and abs(left - right) <= NEAR:
            continue
        yield path, left, right, kind


def compare(arguments: argparse.Namespace) -> int:
    """The exit code, after every difference has been printed."""
    record, here = json.loads(RECORD.read_text(encoding="utf-8")), machine()
    told = {key: f"{key} is {here[key]}, recorded {was}" for key, was in record["machine"].items() if here[key] != was}
    if other := [said for key, said in told.items() if key in SAME_MACHINE]:
        print(f"The record is of another machine, which rounds in another way: {'; '.join(other)}.")
        return 2
    for said in told.values():
        print(f"note: {said}")
    with workplace() as place:
        new = (quickly_recorded if arguments.quick else recorded)(place)
    old: dict[str, Any] = {key: record["found"][key] for key in new}
    if arguments.quick:
        old["adapters"] = {name: old["adapters"][name] for name in new["adapters"]}
    counted = 0
    for path, left, right, kind in differences(old, new):
        fails = kind != "words" or arguments.words
        counted += fails
        print(f"{'differs' if fails else 'words'}: {path}\n  old {left!r}\n  new {right!r}")
    compared = sum(1 for _ in leaves(new))
    verdict = f"{counted} of {compared} values differ from" if counted else f"All {compared} values are those of"
    print(f"{verdict} the record of {record['commit'][:10]}.")
    return 1 if counted else 0


def record(arguments: argparse.Namespace) -> int:
    """Writes the record."""
    began = time.monotonic()
    with workplace() as place:
        found = recorded(place)
    seeds = {"models": SEED, "rows": SEED, "train.seed": SEED, "data.split_seed": "default", "evaluate.seed": "default"}
    head = {"machine": machine(), "commit": commit(), "environment": ENVIRONMENT, "seeds": seeds, "near_tolerance_bytes": NEAR}
    text = json.dumps({**head, "notes": NOTES, "found": found}, ensure_ascii=False, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(f"Recorded {sum(1 for _ in leaves(found))} values in {time.monotonic() - began:.0f} s: {arguments.out}")
    return 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(required=True)
    recording = verbs.add_parser("record", help="Write the record anew.")
    recording.add_argument("--out", type=Path, default=RECORD, help="Where it goes.")
    recording.set_defaults(work=record)
    comparing = verbs.add_parser("compare", help="Compute everything again and print what differs.")
    comparing.add_argument("--quick", action="store_true", help="Compare the four adapters of the native kernels only.")
    comparing.add_argument("--words", action="store_true", help="Let texts that differ count as well.")
    comparing.set_defaults(work=compare)
    arguments = parser.parse_args()
    code: int = arguments.work(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
