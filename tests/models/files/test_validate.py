"""Every weight that is missing, of another shape or no number is named in one message, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.models.files.validate import (
    auto_class_of,
    first_line,
    loading,
    refused,
    require_architecture,
    require_finite,
    require_sizes,
    require_text_model,
    require_whole,
)

FOLDER = Path("m")


def test_shapes_and_missing_weights_are_said_together_and_a_few_of_many_named() -> None:
    misfits = {f"w{number}": ((2, number), (2, 3)) for number in range(10)}
    with pytest.raises(DataError) as caught:
        require_whole(FOLDER, "llama", misfits=misfits, missing={"b", "a"})
    said = str(caught.value)
    assert said.startswith("m is no whole 'llama' model (2 problems):") and "has 10 weights of other shapes" in said
    assert "w0 is 2×0, expected 2×3;" in said and "w8" not in said and "; and 2 more. config.json and weights" in said
    assert "lacks 2 weights of its 'llama' architecture: a; b; they would be random numbers" in said
    require_whole(FOLDER, "llama", misfits={}, missing=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_are_looked_at_in_every_dtype(dtype: torch.dtype) -> None:
    good = torch.linspace(-3, 3, 12).to(dtype)
    require_finite(good, "w")
    require_finite(good[:0], "w")
    bad = torch.linspace(-3, 3, 12)
    bad[5] = float("nan")
    with pytest.raises(DataError, match=r"^f: w has 1 values of 12 that are NaN or infinite\. Fetch the model again\.$"):
        require_finite(bad.to(dtype), "f: w")


def test_what_transformers_gives_up_on_is_looked_for_among_tensors_of_a_kind(tmp_path: Path) -> None:
    tensors = {f"layers.{layer}.experts.{expert}.w": torch.zeros(4, 3) for layer in range(2) for expert in range(3)}
    tensors["layers.1.experts.2.w"] = torch.zeros(5, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    file = open_safetensors(tmp_path / "model.safetensors")
    files = dict.fromkeys(file.tensors, file)
    said = str(refused(tmp_path, "mixtral", files, RuntimeError("We encountered some issues during automatic conversion of …")))
    assert (
        "1 weights that do not go with the others: layers.1.experts.2.w is 5×3, similar ones are 4×3. Fetch it again."
        in said
    )
    del files["layers.1.experts.2.w"]
    said = str(refused(tmp_path, "mixtral", files, RuntimeError("We encountered some issues during automatic conversion of …")))
    assert "cannot be loaded for text generation: its weights do not go together" in said and "fetch both again" in said
    said = str(refused(tmp_path, "x", files, ValueError("first.\nsecond")))
    assert "ValueError: first. config.json" in said and "second" not in said
    assert first_line(KeyError()) == "KeyError"


def test_an_architecture_that_transformers_lacks(tmp_path: Path) -> None:
    for text, words in (
        ('{"model_type": "llama"}', ""),
        ('{"model_type": "lama"}', r"model_type is 'lama'.*Did you mean 'llama'\?.*pip install --upgrade transformers"),
        ('{"model_type": "ours-7", "auto_map": {}}', r"code of its own \(auto_map\), which is never run"),
        ("{}", "names no model_type"),
        ("[]", "holds a JSON list"),
    ):
        (tmp_path / "config.json").write_text(text)
        if not words:
            require_architecture(tmp_path)
            continue
        with pytest.raises(DataError, match=words):
            require_architecture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**29}, r"num_hidden_layers is 1000+; expected a whole number from 0 to 10,000"),
        ({"num_hidden_layers": 10**4200}, r"num_hidden_layers is a number of \d\d,\d\d\d bits; expected"),
        ({"hidden_size": -1, "intermediate_size": -5}, r"(?s)2 problems.*hidden_size is -1.*intermediate_size is -5"),
        ({"vocab_size": 1e308}, r"vocab_size is 1e\+308; expected a whole number"),
    ],
)
def test_sizes_that_no_model_has(changes: dict[str, Any], words: str) -> None:
    config = AutoConfig.for_model("llama")
    require_sizes("config.json", config)
    vars(config).update(changes)
    with pytest.raises(DataError, match=words):
        require_sizes("config.json", config)


def test_whatever_a_loader_raises_is_one_message() -> None:
    words = "The 'x' model in m cannot be loaded for text generation: ZeroDivisionError: by zero"
    with pytest.raises(DataError, match=words), loading(FOLDER, "x", {}):
        raise ZeroDivisionError("by zero")
    with pytest.raises(DataError, match=r"^as it is$"), loading(FOLDER, "x", {}):
        raise DataError("as it is")


def test_a_model_that_writes_no_text() -> None:
    require_text_model(FOLDER, AutoConfig.for_model("llama"))
    with pytest.raises(DataError, match=r"type 'vit', which does not write text.*Name a language model"):
        require_text_model(FOLDER, AutoConfig.for_model("vit"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", "is an encoder: each of its tokens sees the tokens after it"),
        ("xlm-roberta", "is an encoder"),
        ("bart", "is an encoder-decoder: it writes with another part than it reads with"),
        ("whisper", "is an encoder-decoder"),
        ("florence2", "is an encoder-decoder"),
        ("vit", "does not write text"),
        ("pi0", r"has no text part that can be found: its configuration counts no tokens \(vocab_size\)"),
    ],
)
def test_models_that_cannot_continue_a_text_are_refused_by_their_configuration(kind: str, words: str) -> None:
    with pytest.raises(DataError, match=rf"m/config.json describes a model of type '{kind}', which {words}"):
        require_text_model("m/config.json", AutoConfig.for_model(kind))


@pytest.mark.parametrize(("kind", "owner"), [
    ("gpt_neox", AutoModelForCausalLM), ("gemma3", AutoModelForCausalLM), ("mistral3", AutoModelForMultimodalLM),
])  # fmt: skip
def test_models_that_do_have_an_auto_class_wrappers_too(kind: str, owner: Any) -> None:
    config = AutoConfig.for_model(kind)
    require_text_model("m/config.json", config)
    assert auto_class_of(config) is owner
