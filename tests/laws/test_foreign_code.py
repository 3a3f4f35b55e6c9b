"""No loader runs code that a folder brings, and none asks whether to, with `y` waiting on the standard input."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakeet.verbs.plan import plan
from structure.tree import named, parsed, source_files
from tiny.caches import new_cache
from tiny.gguf_family import write_family_gguf
from tiny.gguf_file import write_tiny_gguf
from tiny.pipelines import save_tiny_scorer
from tiny.runs import chats, quiet, settings, write_rows

READER = "models/files/foreign_code.py"
WALK = Path(__file__).with_name("foreign_code_worker.py")
OWN = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoImageProcessor"), "evil.Thing")


def edit(file: Path, **changes: Any) -> None:
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**held, **changes}))


def infect(folder: Path, marker: Path) -> Path:
    """Puts code into `folder` that leaves `marker` when it runs."""
    for place in (folder, folder / "custom_generate", *(path for path in folder.iterdir() if path.is_dir())):
        place.mkdir(exist_ok=True)
        text = f"open({str(marker)!r}, 'w').close()\nclass Thing: pass\ndef generate(*a, **k): pass\n"
        for name in ("evil.py", "generate.py", "pipeline.py"):
            (place / name).write_text(text)
    return folder


def with_own_tokenizer(folder: Path, **more: Any) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Thing", None]}, **more)


Case = tuple[str, Path, tuple[str, ...] | None]  # the loader, what it loads, words of the refusal; None where it loads natively
Put = Callable[[str, str, Path, tuple[str, ...] | None, Callable[[Path], None]], None]
TOKENIZER = ("tokenizer_config.json", "auto_map")


def with_own_model(at: Path) -> None:
    edit(at / "config.json", auto_map=OWN, model_type="evil")


def put_models(add: Put, llama: Path) -> None:
    add("native", "model", llama, None, lambda at: edit(at / "config.json", auto_map=OWN))
    add("kernel", "model", llama, None, lambda at: edit(at / "config.json", attn_implementation="evil/kernel"))
    add("config", "model", llama, ("config.json", "auto_map"), with_own_model)
    add("plan", "plan", llama, ("config.json", "auto_map"), with_own_model)


def put_tokenizers(add: Put, llama: Path) -> None:
    def listed(at: Path) -> None:
        edit(at / "tokenizer_config.json", auto_map=["evil.Thing", None], tokenizer_class="EvilTokenizer")

    def of_adapter(at: Path) -> None:
        (at / "config.json").unlink()
        edit(at / "adapter_config.json", peft_type="LORA", auto_map={"AutoModel": "evil.Thing"})
        with_own_tokenizer(at, tokenizer_class=None)

    def a_model(at: Path) -> None:
        with_own_model(at)
        edit(at / "tokenizer_config.json", tokenizer_class="AutoModel")

    add("native_tokenizer", "tokenizer", llama, None, with_own_tokenizer)
    add("tokenizer", "tokenizer", llama, TOKENIZER, lambda at: with_own_tokenizer(at, tokenizer_class="EvilTokenizer"))
    add("listed", "tokenizer", llama, TOKENIZER, listed)
    add("adapter", "tokenizer", llama, TOKENIZER, of_adapter)
    add("no_tokenizer", "tokenizer", llama, ("names AutoModel as the class of its tokenizer",), a_model)


def put_gguf(add: Put, name: str, source: Path, loader: str) -> None:
    def natively(at: Path) -> None:
        with_own_tokenizer(at, tokenizer_class="PreTrainedTokenizerFast")
        edit(at / "config.json", auto_map=OWN)
        if name == "gpt2":
            (at / "config.json").unlink()
            edit(at / "adapter_config.json", peft_type="LORA", base_model_name_or_path="elsewhere")

    add(f"{name}_{loader}", loader, source, TOKENIZER, lambda at: with_own_tokenizer(at, tokenizer_class="EvilTokenizer"))
    add(f"{name}_{loader}_natively", loader, source, None, natively)


def put_images(add: Put, sd: Path, scorer: Path) -> None:
    def part(at: Path) -> None:
        edit(at / "model_index.json", scheduler=["evil", "Thing"])

    def any_tokenizer(at: Path) -> None:
        edit(at / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
        with_own_tokenizer(at / "tokenizer")

    def of_scorer(at: Path) -> None:
        with_own_model(at)
        edit(at / "processor_config.json", auto_map=OWN)

    def beside_scorer(at: Path) -> None:
        for file in ("config.json", "preprocessor_config.json"):
            edit(at / file, auto_map=OWN)
        with_own_tokenizer(at)

    add("images", "images", sd, ("model_index.json", "scheduler"), part)
    add("image_shapes", "image_shapes", sd, ("model_index.json", "scheduler"), part)
    add(
        "image_class", "images", sd, ("model_index.json", "_class_name"),
        lambda at: edit(at / "model_index.json", _class_name=["pipeline", "Thing"]),
    )  # fmt: skip
    add("image_auto", "images", sd, ("model_index.json", "tokenizer"), any_tokenizer)
    add("image_named", "images", sd, None, lambda at: with_own_tokenizer(at / "tokenizer"))
    add("scorer", "scorer", scorer, ("auto_map",), of_scorer)
    add("scorer_natively", "scorer", scorer, None, beside_scorer)


@pytest.fixture
def cases(tiny_llama_folder: Path, tiny_sd_folder: Path, tmp_path: Path) -> dict[str, Case]:
    """Every case, by name."""
    found: dict[str, Case] = {}

    def add(name: str, loader: str, source: Path, words: tuple[str, ...] | None, change: Callable[[Path], None]) -> None:
        copy = Path(shutil.copytree(source, tmp_path / name))
        change(infect(copy, tmp_path / f"{name}.ran"))
        found[name] = (loader, copy, words)

    (packed := tmp_path / "packed").mkdir()
    write_tiny_gguf(packed / "m.gguf", "Q8_0")
    (gpt2 := tmp_path / "gpt2").mkdir()
    write_family_gguf(gpt2 / "m.gguf", "gpt2", n_positions=1024)
    put_models(add, tiny_llama_folder)
    put_tokenizers(add, tiny_llama_folder)
    put_gguf(add, "llama", packed, "gguf_dense")
    put_gguf(add, "llama", packed, "gguf_packed")
    put_gguf(add, "gpt2", gpt2, "gguf_dense")
    put_images(add, tiny_sd_folder, save_tiny_scorer(tmp_path / "scorer_source"))
    return found


@pytest.mark.slow
def test_every_loader_refuses_or_loads_natively_and_runs_nothing(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    asked = json.dumps({name: (loader, str(source)) for name, (loader, source, _) in cases.items()})
    cache = str(new_cache(tmp_path / "cache"))
    environment = {**os.environ, "LORAKEET_CACHE": cache, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, str(WALK), asked], input="y\n" * 1000, capture_output=True, text=True, env=environment, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[y/N]" not in done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    ran = sorted(path.name for path in tmp_path.glob("*.ran"))
    assert not ran, f"code of a folder ran: {ran}"
    wrong = {
        name: said[name]
        for name, (_, _, words) in cases.items()
        if (said[name] != "loaded" if words is None else any(word not in said[name] for word in ("Error: ", *words)))
    }
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.mark.slow
def test_only_one_file_calls_what_reads_a_folder() -> None:
    """`X.from_pretrained`, and an Auto class's `from_config`, stand in one file, where trust_remote_code is False."""
    found = []
    for path in source_files():
        for node in ast.walk(parsed(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, verb = ast.unparse(node.func.value), node.func.attr
            refuses = any(word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in node.keywords)
            of_auto = owner.rpartition(".")[2].startswith("Auto") and not owner.endswith("AutoencoderKL")
            of_nothing = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value is None
            bound = (verb == "from_pretrained" and not of_nothing) or (verb == "from_config" and of_auto)
            own = owner.rpartition(".")[2] == "PeftModel"  # puts an adapter that Lorakeet wrote onto a model in memory
            if bound and not own and not (named(path) == READER and refuses):
                found.append(f"{named(path)}:{node.lineno}: {owner}.{verb}; call read_native or build_native of {READER}")
    assert not found, "\n".join(found)


NEVER = {"os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads", "torch.load", "marshal.loads", "joblib.load",
         "yaml.full_load", "yaml.unsafe_load", "code.interact", "runpy.run_path"}  # fmt: skip


# Values that a program's own forked processes send through an anonymous pipe.
OWN_FORKS = {("studio/workbench.py", "pickle.loads"), ("memory/beside.py", "pickle.loads")}


@pytest.mark.slow
def test_nothing_is_unpickled_and_no_shell_reads_a_text() -> None:
    """One shell runs: a script of the studio, whose words are its arguments. Two files of Python are run: that of a metric, and
    one of an installed package, beside the rest of which it is read.
    """
    found, shells, runs = [], set(), set()
    for path in source_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(("/sh", "/bash")):
                shells.add(named(path))
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            allowed = (named(path), name) in OWN_FORKS
            odd = any(given.get(word, "False") != "False" for word in ("shell", "allow_pickle"))
            if (name in NEVER and not allowed) or odd:
                found.append(f"{named(path)}:{node.lineno}: {name}")
            if name.endswith("exec_module"):
                runs.add(named(path))
    assert not found and shells == {"studio/jobs.py"}, (found, shells)
    assert runs == {"evaluate/own_metric.py", "kernels/gptqmodel.py"}


@pytest.mark.slow
def test_a_metric_that_a_run_file_names_is_run_by_finetune_alone(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """`evaluate` has a flag of its own for it; of what a run file names, nothing else runs any code."""
    callers = {
        named(path)
        for path in source_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_metric"
    }
    assert callers == {"kinds/text/kind.py", "verbs/evaluate.py"}
    (tmp_path / "my.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(reply, reference):\n    return 1\n")
    rows = write_rows(tmp_path / "rows.jsonl", chats(20))
    plan(settings(tiny_llama_folder, rows, tmp_path / "run", {"evaluate.metric": f"{tmp_path / 'my.py'}:f"}), console=quiet())
    assert not (tmp_path / "ran").exists()
