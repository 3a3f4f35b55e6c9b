"""Loading: what is refused, what is checked, and that a wrong head or attention never passes."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, LorakeetError
from lorakeet.models import families
from lorakeet.models.generate.sample import end_ids
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text import load
from lorakeet.models.text.load import load_text_model, load_tokenizer
from lorakeet.quant.spec import QuantSpec
from tiny.models import FAMILIES, save_tiny_llama, tiny_tokenizer


def spec(path: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(**{"path": str(path), "dtype": "float32", "device": "cpu", **settings})


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_s_end_ids_end_a_text_however_it_is_loaded(folder: Path, dtype: str, method: str, streamed: bool) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}), encoding="utf-8")
    store = folder.with_name("store") if streamed else None
    asked = spec(folder, dtype=dtype, quantize=QuantSpec(method=method))  # type: ignore[arg-type]
    assert end_ids(load_text_model(asked, store=store)) == {2, 7}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_passes_its_check_in_silence(
    tmp_path: Path, family: str, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tiny_llama(tmp_path, family=family)
    capfd.readouterr()
    said: list[str] = []
    text = load_text_model(spec(tmp_path, dtype=dtype), say=said.append)
    assert (text.attention, said) == ("varlen", [])
    assert text.dtype == text.model.dtype == getattr(torch, dtype)
    assert not text.model.training
    assert not any(parameter.requires_grad for parameter in text.model.parameters())
    assert capfd.readouterr() == ("", "")


def test_gemma2_on_sdpa_is_refused_as_it_would_lose_its_cap(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, family="gemma2")
    with pytest.raises(EnvironmentProblem, match=r"model.attention sdpa cannot be used.*gemma2.*Use model.attention auto"):
        load_text_model(spec(tmp_path, attention="sdpa"))


@pytest.mark.parametrize(
    ("family", "settings"), [("gemma2", {}), ("cohere", {"logit_scale": 0.5}), ("granite", {"logits_scaling": 4.0})]
)
def test_a_head_formula_that_is_not_known_never_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any]
) -> None:
    """The same model loads with its own family's data, and is refused when treated as one of no known family."""
    _save(tmp_path, family, settings)
    load_text_model(spec(tmp_path))
    unknown = replace(families.GENERIC, soft_cap="", logit_divisor="")
    monkeypatch.setattr(load, "family_of_model", lambda _: unknown)
    with pytest.raises(EnvironmentProblem, match=f"The head of '{family}' models computes its logits in a way"):
        load_text_model(spec(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cap_far_above_the_logits_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Logits of a random model are near 1, those of a trained one near its cap: the head is checked there too."""
    save_tiny_llama(tmp_path, family="gemma4", final_logit_softcapping=200.0, vocab_size_per_layer_input=320)
    text = load_text_model(spec(tmp_path, dtype=dtype))
    assert text.head_weight is None and text.family is families.GENERIC
    states = torch.full((1, 32), 1e4, dtype=text.dtype)
    assert float(text.head(states).abs().max()) <= 200.0
    monkeypatch.setattr(load, "family_of_model", lambda _: replace(families.GENERIC, soft_cap=""))
    with pytest.raises(EnvironmentProblem, match="The head of 'gemma4_text' models computes its logits in a way"):
        load_text_model(spec(tmp_path, dtype=dtype))


def _save(folder: Path, family: str, settings: dict[str, Any]) -> None:
    if family in FAMILIES:
        save_tiny_llama(folder, family=family)
        return
    tokenizer = tiny_tokenizer()
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_attention_that_gives_other_logits_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakeet.models import attention

    right = attention.packed_attention

    def wrong(*arguments: Any, **settings: Any) -> Any:
        output, weights = right(*arguments, **settings)
        return output.flip(1), weights

    monkeypatch.setattr(attention, "packed_attention", wrong)
    said: list[str] = []
    try:
        assert load_text_model(spec(folder), say=said.append).attention == "sdpa"
        assert "varlen gives other logits than the 'llama' model's own code" in said[0]
        with pytest.raises(EnvironmentProblem, match=r"model.attention varlen cannot be used: varlen gives other logits"):
            load_text_model(spec(folder, attention="varlen"))
    finally:
        monkeypatch.undo()
        attention.register()
    assert load_text_model(spec(folder)).attention == "varlen"


@pytest.mark.parametrize("error", [KeyError("sliding_attention"), RuntimeError("shapes cannot be multiplied")])
def test_own_code_that_fails_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fails)
    with pytest.raises(EnvironmentProblem, match=rf"'llama' models cannot be used: the code of transformers .*{error.args[0]}"):
        load_text_model(ModelSpec(path=str(folder)))


def test_a_decoder_without_hidden_states_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "get_decoder", lambda self: self)
    monkeypatch.setattr("lorakeet.models.modules.decoder_of", lambda model: model)
    with pytest.raises(EnvironmentProblem, match=r"'llama' models cannot be used: .* gives no hidden states \(CausalLMOutput"):
        load_text_model(ModelSpec(path=str(folder)))


def test_missing_weights_are_named_not_drawn_at_random(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights of its 'llama' architecture: model.layers.1.mlp.up_proj"):
        load_text_model(spec(folder))


def test_weights_of_another_shape_than_the_configuration_are_named_with_both_shapes(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 40}))
    with pytest.raises(DataError) as caught:
        load_text_model(spec(folder))
    said = str(caught.value)
    assert "has 6 weights of other shapes than its config.json says" in said
    assert "model.layers.0.mlp.down_proj.weight is 32×48, expected 32×40;" in said and "fetch both again" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model.layers.1.mlp.up_proj.weight has NaN or infinite values. Fetch it again\."):
        load_text_model(spec(folder))


def test_int8_products_without_weights_in_int8_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"int8_products is true, but no weight .* Set model.quantize.method to int8"):
        load_text_model(replace(spec(folder), quantize=QuantSpec(int8_products=True)))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"hidden_size": 64}, DataError, "has 20 weights of other shapes than its config.json says"),
        ({"model_type": "no_such_model"}, DataError, "model_type is 'no_such_model', which is no kind of model"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ConfigError, "quantised weights"),
        ({"model_type": "vit"}, DataError, "does not write text"),
        ({"num_hidden_layers": "two"}, DataError, r"config\.json cannot be read .*'num_hidden_layers'.*'two'.*Fetch it again"),
        ({"num_attention_heads": 5}, DataError, r"config\.json cannot be read .*not a multiple of .*5.*Fetch it again"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict[str, Any], kind: type[LorakeetError], words: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(kind, match=words):
        load_text_model(spec(folder))


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="The tokenizer in"):
        load_text_model(spec(folder))


def test_a_tokenizer_alone(folder: Path) -> None:
    assert load_tokenizer(folder)("hi")["input_ids"]
