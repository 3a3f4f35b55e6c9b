"""Bad input at the command line: one message with the value, what was expected and the remedy; exit code 2; nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.cli.main import main
from tiny.models import save_tiny_llama
from tiny.peft_oracle import by_peft
from tiny.refusals import Bench
from tiny.runs import chats, reviews, write_rows

Bad = Callable[[list[dict[str, Any]]], list[Any]]
GOOD = reviews(30)
NOTHING = ["--rank-choices", "4", "--target-choices", "mlp", "--rate-factors", "1,1"]  # to choose between
LONG = {"text": "long " * 80, "label": "good"}


@pytest.fixture
def bench(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Bench:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", GOOD)
    return Bench(tmp_path, tiny_llama_folder, capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora.target_modules", "q_prj"], ["No module matches target 'q_prj'", "k_proj", "Did you mean 'q_proj'?"]),
        (["--lora.exclude_modules", "up_prj"], ["'up_prj' matches no module", "Did you mean 'up_proj'?"]),
        (["--lora.rnak", "8"], ["No such flag '--lora.rnak'", "Did you mean '--lora.rank'?"]),
        (["--rank", "8"], ["No such flag '--rank'", "Did you mean '--lora.rank'?"]),
        (["--lora.rank", "0"], ["lora.rank is 0", "must be 1 or more", "Try 8 or 16"]),
        (["--lora.rank", "-4"], ["lora.rank is -4", "must be 1 or more"]),
        (["--lora.rank", "four"], ["'four' (text)", "expected a whole number"]),
        (["--lora.rank", "20"], ["Rank 20 is larger than", "k_proj (16×32)", "at most 16", "lora.rank_pattern"]),
        (["--lora.rank_pattern", "zzz=2"], ["lora.rank_pattern 'zzz' matches none", "q_proj"]),
        (["--lora.layers", "5-9"], ["lora.layers is '5-9'", "0 to 1"]),
        (["--lora.rank", "0", "--train.steps", "0", "--model.dtype", "bf16"], ["lora.rank is 0", "train.steps is 0", "bfloat16"]),
        (["--train.learning_rate", "1e30"], ["train.learning_rate is 1e+30", "at most 1", "such as 2e-4"]),
        (["--model.device", "cuda:7"], ["cuda:7", "model.device auto"]),
        (["--data.held_out_fraction", "1.5"], ["held_out_fraction is 1.5", "from 0 to below 1"]),
        (["--data.held_out_fraction", "0"], ["No rows are held out", "data.held_out"]),
        (["--data.label_column", "lable"], ["no column 'lable'", "'text', 'label'", "Did you mean 'label'?"]),
        (["--data.held_out", "rows.jsonl"], ["All 30 held-out rows are training rows too", "Give other held-out rows"]),
        (["--data.test", "rows.jsonl"], ["test rows.jsonl:", "exact copy", "Give other rows"]),
        (["--data.max_tokens", "8"], ["data.max_tokens is 8", "Raise --data.max_tokens"]),
        (["--data.max_tokens", "8", "--data.too_long", "drop"], ["All 27 rows are longer", "raise --data.max_tokens"]),
        (["--out", "rows.jsonl"], ["The run folder rows.jsonl is a file", "choose another --out"]),
        (["--out", "rows.jsonl/run"], ["rows.jsonl/run cannot be made", "Choose another --out"]),
        (["--ranks", "auto", "--budget", "100"], ["100 parameters is below rank 1 for each of the 14 targets"]),
        (["--ranks", "auto", "--budget", "9M"], ["9,000,000 parameters is above the full rank of all 14 targets"]),
        (["--ranks", "auto", "--budget", "lots"], ["ranks.budget is 'lots'", "1.5M"]),
        (["--budget", "3000"], ["Add --ranks auto"]),
        (["--resume", "nowhere"], ["--resume takes every setting from nowhere/config.yaml"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)  # fmt: skip
def test_a_wrong_setting(bench: Bench, flags: list[str], words: list[str]) -> None:
    bench.refused(bench.finetune(*flags), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lora: {rnk: 4}\n", ["Unknown key 'lora.rnk'", "Did you mean 'lora.rank'?"]),
        ("lorra: {rank: 4}\n", ["Unknown key 'lorra'", "Did you mean 'lora'?"]),
        ("lora: {rank: 4\n", ["not valid YAML at line", "column"]),
        ("lora: {rank: 4, rank: 5}\n", ["key 'rank' is given twice"]),
    ],
)
def test_a_wrong_run_file(bench: Bench, content: str, words: list[str]) -> None:
    name = bench.write("run.yaml", f"model: {bench.model}\ndata: rows.jsonl\n{content}")
    bench.refused(["finetune", name], name, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["No budget is given", "--minutes or --tokens, or use --try-rates"]),
        (["--minutes", "0", "--together", "1"], ["(2 problems)", "--minutes is 0", "--together is 1"]),
        (["--minutes", "1", *NOTHING], ["The search space has nothing in it to choose"]),
        (["--try-rates", "--difference", "-1"], ["--difference is -1; it must be above 0"]),
    ],
    ids=" ".join,
)
def test_a_search_that_cannot_begin(bench: Bench, flags: list[str], words: list[str]) -> None:
    name = bench.write("run.yaml", f"model: {bench.model}\ndata: rows.jsonl\nout: run\n")
    bench.refused(["tune", name, *flags], *words)


def test_missing_and_unreadable_files(bench: Bench) -> None:
    bench.refused(bench.finetune(data="rows.jsn"), "'rows.jsn' does not exist", "Did you mean 'rows.jsonl'?")
    bench.refused(["finetune", "none.yaml"], "none.yaml does not exist", "Give the path of a run file")
    bench.refused(bench.finetune(data="."), "'.' is a folder", "name a file in it")
    bench.refused(bench.finetune(data=bench.write("latin.jsonl", b'{"text": "\xff"}\n')), "not utf-8", "--data.encoding")
    bench.refused(bench.finetune(data=bench.write("rows.xyz", "a")), "'.xyz'", ".jsonl", ".parquet")
    bench.refused(bench.finetune(data=bench.write("empty.jsonl", "")), "empty.jsonl has no rows", "expected at least one")
    bench.refused(bench.finetune(model="./no/model"), "'./no/model' does not exist", "Check the path")
    bench.refused(bench.finetune(model="rows.jsonl"), "'rows.jsonl' is a .jsonl file", "expected a model folder or a .gguf")
    bench.refused(["finetune", bench.write("list.yaml", "- 1\n")], "list.yaml holds [1]", "expected keys such as")
    bench.refused(["evaluate", "no/run"], "no/run does not exist", "expected the folder of a run")
    bench.refused(["merge", "no/run", "--out", "merged"], "no/run does not exist")
    bench.refused(["compress", "no/run", "--out", "small"], "no/run does not exist", "expected the folder of a run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(bench: Bench) -> None:
    (bench.folder / "rows.jsonl").chmod(0)
    try:
        bench.capsys.readouterr()
        assert main(bench.finetune()) == 2
        assert "rows.jsonl cannot be read: Permission denied" in bench.capsys.readouterr().err
    finally:
        (bench.folder / "rows.jsonl").chmod(0o600)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that can be opened and not read is Linux's")
def test_a_file_that_the_system_will_not_read(bench: Bench) -> None:
    """Whoever runs the tests: reading the first bytes of a process's own memory is an error of the disk, not of permission."""
    for name in ("rows.jsonl", "run.yaml", "mo.gguf"):
        (bench.folder / name).unlink(missing_ok=True)
        (bench.folder / name).symlink_to("/proc/self/mem")
    unread = ("cannot be read: Input/output error", "Check the path, its permissions and the disk.")
    for command, name in (
        (bench.finetune(), "rows.jsonl"),
        (["finetune", "run.yaml"], "run.yaml"),
        (bench.finetune(data=bench.write("good.jsonl", GOOD), model="mo.gguf"), "mo.gguf"),
    ):
        code = main(command)
        output = bench.capsys.readouterr()
        assert code == 2 and output.err.count("Error: ") == 1 and "Traceback" not in output.err
        assert all(word in " ".join(output.err.split()) for word in (name, *unread)), output.err
    assert not (bench.folder / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*GOOD, {"text": "  ", "label": "bad"}, {"text": "", "label": "bad"}],
         ["(2 problems)", "bad.jsonl:31: column 'text' is empty", "bad.jsonl:32", "remove the row or fill it"]),
        ([*GOOD, {"text": "a b", "label": ""}], ["bad.jsonl:31: column 'label' is empty"]),
        ([{"txt": row["text"], "label": row["label"]} for row in GOOD],
         ["the columns 'txt', 'label' match no known shape", "--data.text_column"]),
        ([{**row, "label": "good"} for row in GOOD], ["All 27 training rows have the label 'good'", "at least two labels"]),
        (GOOD[:5], ["5 rows are too few to hold out 10 %", "expected at least 10", "--data.held_out FILE"]),
        ([{"messages": [{"role": "usr", "content": "a"}]}] * 12, ["the role 'usr'", "system, user, assistant", "mean 'user'?"]),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 12, ["no message of the assistant, so nothing to train on"]),
    ],
    ids=["empty text", "empty label", "missing column", "one label", "too few rows", "wrong role", "nothing to learn"],
)  # fmt: skip
def test_wrong_rows(bench: Bench, rows: list[Any], words: list[str]) -> None:
    bench.refused(bench.finetune(data=bench.write("bad.jsonl", rows)), *words)


def test_broken_json_names_its_line(bench: Bench) -> None:
    lines = (bench.folder / "rows.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-4]
    name = bench.write("broken.jsonl", "\n".join(lines) + "\n")
    bench.refused(bench.finetune(data=name), "broken.jsonl:3: broken JSON at column", "fix or remove the line")


@pytest.mark.parametrize("part", ["held_out", "test"])
def test_a_label_that_training_never_saw(bench: Bench, part: str) -> None:
    name = bench.write("other.jsonl", [{"text": "elder fern", "label": "goood"}])
    words = ["The label 'goood' of 1", "(other.jsonl:1) is unseen in training", "'bad', 'good', 'so so'", "Did you mean 'good'?"]
    bench.refused(bench.finetune(f"--data.{part}", name), *words)


@pytest.mark.slow
def test_a_row_longer_than_the_context_is_refused_cut_or_dropped_as_configured(bench: Bench) -> None:
    data = bench.write("long.jsonl", [*GOOD, LONG])
    words = ["long.jsonl:31: the row has 4", "data.max_tokens is 120", "too_long to truncate or drop"]
    bench.refused(bench.finetune("--data.too_long", "refuse", data=data), *words)
    for too_long, counted in (("truncate", "1 held-out rows shortened to 120 tokens, 0 left out"),
                              ("drop", "0 held-out rows shortened to 120 tokens, 1 left out")):  # fmt: skip
        assert main(bench.finetune("--data.too_long", too_long, "--dry-run", data=data)) == 0
        assert counted in bench.capsys.readouterr().out
    assert main(bench.finetune("--data.max_tokens", "9999", "--dry-run", data=data)) == 0
    said = " ".join(bench.capsys.readouterr().out.split())
    assert "takes rows of at most 256 tokens; 256 is used" in said and "1 held-out rows shortened to 256 tokens" in said
    assert not (bench.folder / "run").exists()


@pytest.mark.slow
def test_a_model_without_a_chat_template(bench: Bench) -> None:
    model = save_tiny_llama(bench.folder / "bare")
    (model / "chat_template.jinja").unlink()
    data = bench.write("chats.jsonl", chats(30))
    command = bench.finetune("--data.chat_template", "on", data=data, model=model)
    bench.refused(command, "the tokenizer has no chat template", "--data.chat_template off")
    assert main(bench.finetune("--dry-run", data=data, model=model)) == 0
    assert "no chat template, so turns are joined as raw text" in bench.capsys.readouterr().out


def test_a_run_folder_that_exists(bench: Bench) -> None:
    (bench.folder / "run").mkdir()
    bench.write("run/notes.txt", "precious")
    bench.refused(bench.finetune(), "The run folder run exists already; nothing in it was touched", "another --out")
    bench.write("run/config.yaml", "model: m\n")
    bench.refused(bench.finetune(), "lorakeet finetune --resume run", "another --out")


@pytest.fixture
def adapter(bench: Bench) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(bench.model)
    by_peft(bench.folder / "adapter", model, target_modules=["q_proj", "up_proj"])
    return bench.folder / "adapter"


@pytest.mark.parametrize("verb", [["evaluate", "adapter", "--data", "rows.jsonl"], ["merge", "adapter", "--out", "merged"]])
def test_an_adapter_for_another_base_lists_every_mismatch(bench: Bench, adapter: Path, verb: list[str]) -> None:
    other = save_tiny_llama(bench.folder / "other", hidden_size=16, num_hidden_layers=1)
    said = bench.refused([*verb, "--base", str(other)], "does not fit", "4×16" if verb[0] == "evaluate" else "")
    assert said.endswith("with --base." if verb[0] == "merge" else f"Use the base that it was trained on: {bench.model}."), said
    for path in ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"):
        assert path in said


@pytest.mark.parametrize("cut", [4, 200, -100])
def test_truncated_safetensors(bench: Bench, adapter: Path, cut: int) -> None:
    for folder, command in (
        (save_tiny_llama(bench.folder / "cut"), bench.finetune(model="cut")),
        (adapter, ["evaluate", "adapter", "--data", "rows.jsonl"]),
        (adapter, ["merge", "adapter", "--out", "merged"]),
    ):
        file = next(folder.glob("*.safetensors"))
        whole = file.read_bytes()
        file.write_bytes(whole[:cut])
        bench.refused(command, file.name, "bytes long", "cut off")
        file.write_bytes(whole)


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_pickle_files_are_refused_and_never_loaded(bench: Bench, adapter: Path) -> None:
    model = save_tiny_llama(bench.folder / "pickled")
    (model / "model.safetensors").unlink()
    torch.save(Bomb(), model / "pytorch_model.bin")
    bench.refused(bench.finetune(model=model), "pytorch_model.bin, a pickle file", "never loaded", ".safetensors")
    torch.save(Bomb(), bench.folder / "rows.pkl")
    bench.refused(bench.finetune(data="rows.pkl"), "'.pkl'", "expected one of")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapter / "adapter_model.bin")
    bench.refused(["evaluate", "adapter", "--data", "rows.jsonl"], "adapter_model.bin is a pickle file", "Save the adapter again")
    bench.refused(["evaluate", "adapter/adapter_model.bin", "--data", "rows.jsonl"], "is a pickle file")
    assert not (bench.folder / "exploded").exists()


def test_a_foreign_adapter_key_is_refused_by_name(bench: Bench, adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": [[0, 2]]}))
    bench.refused(["merge", "adapter", "--out", "merged"], "layer_replication")


def test_the_message_is_json_where_a_machine_asks(bench: Bench) -> None:
    assert main([*bench.finetune("--lora.target_modules", "q_prj"), "--json"]) == 2
    output = bench.capsys.readouterr()
    answer = json.loads(output.out)
    assert answer["error"]["code"] == "setting-refused" and "Did you mean 'q_proj'?" in answer["error"]["message"]
    assert not (bench.folder / "run").exists()
