"""Adapters between PEFT's models in memory and values."""

from __future__ import annotations

import pytest
import torch

import lorakeet as lk
from lorakeet.errors import ConfigError, LorakeetError
from tiny.models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
IDS = torch.tensor([[1, 5, 7, 9, 11]])


def peft_model() -> object:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    return model


def test_there_and_back_computes_the_same() -> None:
    model = peft_model()
    adapter = lk.from_peft(model)
    assert len(adapter) == 4 and {pair.rank for pair in adapter.pairs.values()} == {4}
    assert {pair.rank for pair in lk.from_peft(model, "other").pairs.values()} == {2}
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
        net = tiny_model("llama")
        lk.attach(net, adapter)
        torch.testing.assert_close(net(input_ids=IDS).logits, theirs, rtol=0, atol=1e-5)
        again = lk.to_peft(adapter, tiny_model("llama"))
        assert torch.equal(again(input_ids=IDS).logits, theirs)


def test_what_is_no_peft_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model is LlamaForCausalLM.*; expected a PeftModel"):
        lk.from_peft(tiny_model("llama"))
    from peft import IA3Config, get_peft_model

    foreign = get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(LorakeetError, match="IA3"):
        lk.from_peft(foreign)
    with pytest.raises(ConfigError, match=r"no adapter 'othr'; it has default, other. Did you mean 'other'\?"):
        lk.from_peft(peft_model(), "othr")
