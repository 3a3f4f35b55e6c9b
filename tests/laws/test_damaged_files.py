"""Each reader gives one message, with the file's name and of bounded length, whatever is wrong with a file of a stranger."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from lorakeet.core.adapter import TokenRows
from lorakeet.errors import LONGEST_MESSAGE, LorakeetError
from lorakeet.evaluate.certificate import Certificate, Check, Unchecked, read_certificate
from lorakeet.formats import gguf, mlx
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.diffusion import diffusers, kohya
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.peft import peft
from lorakeet.kinds.images.model.shapes import shapes_in
from lorakeet.models.files.gguf_dense import dense_copy
from lorakeet.models.files.gguf_packed import packed_copy
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import config_of
from lorakeet.models.text.load import ReadBefore, load_text_model, load_tokenizer
from tiny.adapters import random_adapter
from tiny.damage import TEXTS, files_in, other_bytes, other_file, other_folder, put
from tiny.fuzz import case_folder, fuzzed
from tiny.gguf_file import write_tiny_gguf
from tiny.gptq_folder import save_mixed_gptq
from tiny.models import save_tiny_llama, tiny_model
from tiny.portable import image_adapter


def quiet(line: str) -> None:
    pass


def read_or_refuse(read: Callable[[], Any]) -> str:
    """What the reader refuses with, or an empty string; any other exception is a failure of the test."""
    try:
        read()
    except LorakeetError as error:
        said = str(error)
        assert len(said) <= LONGEST_MESSAGE
        return said
    return ""


@cache
def adapters() -> dict[str, dict[str, bytes]]:
    """The files of an adapter of every format, by name."""
    with TemporaryDirectory() as name:
        return _adapters(Path(name))


def _adapters(folder: Path) -> dict[str, dict[str, bytes]]:
    model, experts = tiny_model("llama"), tiny_model("mixtral")
    plain, dora = random_adapter(model, "q_proj", "down_proj"), random_adapter(model, "q_proj", dora=True)
    rows = {"model.embed_tokens": TokenRows((1, 5), torch.zeros(2, 32), ("<a>", "<b>"))}
    folders = {
        "peft": plain, "peft dora": dora, "peft experts": random_adapter(experts, "gate_up_proj", "down_proj", "q_proj"),
        "peft rows": replace(plain, token_rows=rows, extras={"model.norm.weight": torch.ones(32)}),
    }  # fmt: skip
    for name, adapter in folders.items():
        peft.write(adapter, folder / name)
    for name, adapter in (("mlx", plain), ("mlx dora", dora)):
        mlx.write(adapter, folder / name)
    for module in (kohya, diffusers):
        for dora_too in (False, True):
            name = f"{module.NAME} {dora_too}"
            (folder / name).mkdir()
            module.write(image_adapter(dora=dora_too), folder / name / "a.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "dtype": "float32"}))
    (folder / "gguf").mkdir()
    gguf.write(random_adapter(model, "q_proj"), folder / "gguf" / "a.gguf", base=open_base(folder / "config.json"))
    return {path.name: files_in(path) for path in sorted(folder.iterdir()) if path.is_dir()}


@pytest.mark.slow
@fuzzed(quick=500, many=50_000)
@given(files=st.deferred(lambda: st.sampled_from(sorted(adapters())).flatmap(lambda name: other_folder(adapters()[name]))))
def test_adapters(files: dict[str, bytes]) -> None:
    with case_folder() as place:
        folder = put(files, place / "x")
        said = read_or_refuse(lambda: read_adapter(folder, say=quiet))
        assert "report this" not in said, f"the library's own words: {said}"
        assert not said or any(part in said for part in (str(folder), *files)), f"names no file: {said}"


@cache
def models() -> dict[str, dict[str, bytes]]:
    """The files of a dense, a sharded and a quantised model folder."""
    with TemporaryDirectory() as name:
        return _models(Path(name))


def _models(folder: Path) -> dict[str, dict[str, bytes]]:
    from transformers import AutoModelForCausalLM

    save_tiny_llama(folder / "dense", num_hidden_layers=1)
    sharded = AutoModelForCausalLM.from_pretrained(folder / "dense")
    sharded.save_pretrained(folder / "sharded", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "sharded" / name).write_bytes((folder / "dense" / name).read_bytes())
    save_mixed_gptq(folder / "gptq", "gptq_v2")
    return {path.name: files_in(path) for path in sorted(folder.iterdir())}


@cache
def outlines() -> dict[str, dict[str, bytes]]:
    """The files of model folders without their weights: what a plan reads, and the tokenizer."""
    return {kind: {name: data for name, data in files.items() if "safetensors" not in name} for kind, files in models().items()}


@pytest.mark.slow
@fuzzed(quick=500, many=50_000)
@given(
    files=st.deferred(lambda: st.sampled_from(["dense", "gptq"]).flatmap(lambda kind: other_folder(outlines()[kind]))),
    read=st.sampled_from([config_of, lambda spec, say: load_tokenizer(Path(spec.path))]),
)
def test_configurations_and_tokenizers(files: dict[str, bytes], read: Any) -> None:
    with case_folder() as folder:
        spec = ModelSpec(str(put(files, folder / "m")), device="cpu", dtype="float32")
        read_or_refuse(lambda: read(spec, quiet))


@cache
def tokenizer() -> Any:
    with case_folder() as folder:
        return load_tokenizer(put(models()["dense"], folder))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@fuzzed(quick=60, many=8_000)
@given(files=st.sampled_from([*["dense"] * 4, "sharded", "gptq"]).flatmap(lambda name: other_folder(models()[name], TOKENIZER)))
def test_model_folders(files: dict[str, bytes]) -> None:
    """Whole loads, but for the tokenizer, which the test before reads."""
    with case_folder() as folder:
        spec = ModelSpec(str(put(files, folder / "m")), device="cpu", dtype="float32")
        read_or_refuse(lambda: load_text_model(spec, say=quiet, before=ReadBefore(tokenizer=tokenizer())))


@cache
def gguf_model(kind: str | None) -> bytes:
    with TemporaryDirectory() as name:
        write_tiny_gguf(Path(name) / "m.gguf", kind, num_hidden_layers=1)
        return (Path(name) / "m.gguf").read_bytes()


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with TemporaryDirectory() as name:
        monkeypatch.setenv("LORAKEET_CACHE", name)
        yield


@pytest.mark.slow
@fuzzed(quick=500, many=50_000)
@given(
    damaged=st.sampled_from([None, "Q8_0"]).flatmap(lambda kind: other_bytes(gguf_model(kind), 9000)),
    copy=st.sampled_from([packed_copy, dense_copy]),
)
def test_gguf_models(own_cache: None, damaged: bytes, copy: Any) -> None:
    with case_folder() as folder:
        file = folder / "m.gguf"
        file.write_bytes(damaged)
        said = read_or_refuse(lambda: copy(file, quiet))
        assert not said or str(file) in said


@cache
def certificate() -> bytes:
    check = Check("a: logits", "x", "y", {"d": 1.0}, {"d": 2.0}, True, n=3)
    whole = Certificate("s", (check, replace(check, name="own")), {"k": "v"}, (Unchecked("a", "b", "c"),))
    with TemporaryDirectory() as name:
        whole.write(Path(name) / "c.json")
        return (Path(name) / "c.json").read_bytes()


@pytest.mark.slow
@fuzzed(quick=500, many=50_000)
@given(damaged=st.deferred(lambda: other_file("certificate.json", certificate())))
def test_certificates(damaged: bytes) -> None:
    with case_folder() as folder:
        file = folder / "certificate.json"
        file.write_bytes(damaged)
        said = read_or_refuse(lambda: read_certificate(file))
        assert "report this" not in said and (not said or str(file) in said)


def changed_tensors(files: dict[str, bytes], change: Callable[[dict[str, torch.Tensor]], None], **note: str) -> dict[str, bytes]:
    """The files of an adapter with other tensors, and at times another note."""
    [name] = [name for name in files if name.endswith(".safetensors")]
    tensors = load(files[name])
    change(tensors)
    return {**files, name: save(tensors, note or None)}


def changed_config(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    return {**files, "adapter_config.json": json.dumps({**json.loads(files["adapter_config.json"]), **changes}).encode()}


def scalar(end: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Makes the first tensor whose name ends so a single number."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in sorted(tensors) if name.endswith(end))] = torch.tensor(1.0)

    return change


KNOWN: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {  # what other fuzzing found
    "a B of one number under DoRA": (lambda: changed_tensors(adapters()["peft dora"], scalar("lora_B.weight")), r"and B \(\)"),
    "rows of one number": (lambda: changed_tensors(adapters()["peft rows"], scalar("tokens_delta")), r"token rows \(\)"),
    "a note of tokens that is no table": (
        lambda: changed_tensors(adapters()["peft rows"], lambda _: None, lorakeet='{"tokens": {"model.embed_tokens": 5}}'),
        "expected a table",
    ),
    "ids that are false": (lambda: changed_config(adapters()["peft"], trainable_token_indices=False), "is False; expected"),
    "layers that are a table": (lambda: changed_config(adapters()["peft"], layers_to_transform={}), "the number of a layer"),
    "a scale of 400 digits": (
        lambda: changed_config(adapters()["mlx"], lora_parameters={"scale": 10**400}), "scale is 1000.*; expected a finite number"
    ),
    "a DoRA scale of one number": (lambda: changed_tensors(adapters()["kohya True"], scalar("dora_scale")), r"dora_scale \(\)"),
    "a text that is not UTF-8": (
        lambda: {"a.gguf": adapters()["gguf"]["a.gguf"].replace(b'{"base"', b'{"\xffase"')}, "a text that is not UTF-8"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_damage_that_once_made_a_traceback(case: str, tmp_path: Path) -> None:
    make, words = KNOWN[case]
    said = read_or_refuse(lambda: read_adapter(put(make(), tmp_path / "x"), say=quiet))
    assert re.search(words, said), said


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "index"])
def test_a_model_folder_with_any_text_for_a_json_file(name: str, tmp_path: Path) -> None:
    kind = "sharded" if name == "index" else "dense"
    file = "model.safetensors.index.json" if name == "index" else name
    for number, text in enumerate(TEXTS):
        spec = ModelSpec(str(put({**models()[kind], file: text}, tmp_path / str(number))), device="cpu", dtype="float32")
        said = read_or_refuse(lambda spec=spec: load_text_model(spec, say=quiet))
        assert said or name == "generation_config.json"


@pytest.mark.parametrize("changes", [{"pad_token_id": "x"}, {"pad_token_id": {"": None}}, None])
def test_settings_of_generation_of_a_wrong_kind_are_one_message(changes: dict[str, Any] | None, tmp_path: Path) -> None:
    files = models()["gptq"]
    text = b"null" if changes is None else json.dumps({**json.loads(files["generation_config.json"]), **changes}).encode()
    folder = put({**files, "generation_config.json": text}, tmp_path / "m")
    said = read_or_refuse(lambda: load_text_model(ModelSpec(str(folder), device="cpu", dtype="float32"), say=quiet))
    assert f"{folder} has settings for generation that cannot be used" in said and "generation_config.json" in said


@pytest.mark.parametrize("end", ["x", [None], {"a": 1}, [[1]], 10**30, -5, True, 0.5])
def test_an_end_token_that_is_none_is_refused(end: Any, tmp_path: Path) -> None:
    files = models()["dense"]
    text = json.dumps({**json.loads(files["generation_config.json"]), "eos_token_id": end}).encode()
    folder = put({**files, "generation_config.json": text}, tmp_path / "m")
    said = read_or_refuse(lambda: load_text_model(ModelSpec(str(folder), device="cpu", dtype="float32"), say=quiet))
    assert f"{folder} has the eos_token_id {end!r}; expected the id of a token" in said


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**29}, {"hidden_size": -32}, {"intermediate_size": 10**29}])
def test_a_model_of_impossible_sizes_is_never_built(changes: dict[str, int], tmp_path: Path) -> None:
    files = models()["dense"]
    config = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
    spec = ModelSpec(str(put({**files, "config.json": config}, tmp_path / "m")), device="cpu", dtype="float32")
    for read in (lambda: config_of(spec, quiet), lambda: load_text_model(spec, say=quiet)):
        assert f"{next(iter(changes))} is {next(iter(changes.values()))}; expected a whole number" in read_or_refuse(read)


def test_a_pipeline_of_impossible_sizes_is_never_built(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "sd"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 10**29}))
    assert "unet.layers_per_block is 1000" in read_or_refuse(lambda: shapes_in(str(folder), None, quiet))
