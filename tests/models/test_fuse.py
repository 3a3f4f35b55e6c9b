"""Fusing a whole model changes neither its logits nor its gradients, and is taken out without a trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.llama import modeling_llama

from lorakeet.core.fused.attention import RotaryAttention
from lorakeet.core.fused.mlp_and_norm import FrozenRmsNorm
from lorakeet.core.layers.linear import Replacement
from lorakeet.core.spec import LoraSpec
from lorakeet.data.pack import pack_examples
from lorakeet.kernels.choose import elementwise_ops
from lorakeet.kernels.threads import compute_with
from lorakeet.memory.beside import forks_allowed
from lorakeet.memory.ledger import Ledger
from lorakeet.models import fuse, inject
from lorakeet.models.families import family_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.models.text.load import load_text_model
from tiny.configs import SMALL
from tiny.family_columns import loaded, rows, saved
from tiny.models import save_tiny_llama

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def prepared(model: Any) -> dict[str, torch.nn.Parameter]:
    plan = plan_for(model, LoraSpec(rank=4, alpha=12), family_of(model.config))
    inject.inject(model, plan)
    parameters = inject.trained_parameters(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".B"):
                parameter.normal_(std=0.05)
    return parameters


def run(model: Any, parameters: dict[str, torch.nn.Parameter]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    for parameter in parameters.values():
        parameter.grad = None
    ids = (torch.arange(24) * 7 % 50).view(2, 12)
    logits = model(input_ids=ids).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), [parameter.grad for parameter in parameters.values()]


@pytest.mark.parametrize("family", [*GATED, "phi3", "gpt2", "mixtral"])
def test_logits_and_gradients_stay(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    parameters = prepared(model)
    logits, gradients = run(model, parameters)
    count = fuse.fuse(model)
    assert count >= (2 if family in GATED else 0)
    fused_logits, fused_gradients = run(model, parameters)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-5)
    for found, expected in zip(fused_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_norms_are_fused_whatever_a_gpus_kernel_rounds(
    liger: Any, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]
) -> None:
    """On a GPU norms are liger-kernel's, whose sums are in another order. Fusing compares what torch's own operations compute."""

    def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        return torch.nextafter(weight * (x * rho), torch.tensor(torch.inf)), rho

    monkeypatch.setattr(liger, "computes_the_same", lambda *_: True)
    monkeypatch.setattr(liger, "norm", norm)
    x = torch.ones(2, 32)
    assert elementwise_ops(x, x[0], by_rows=True) is liger
    model = tiny_model("llama")
    norms = {path for path, module in model.named_modules() if isinstance(module, modeling_llama.LlamaRMSNorm)}
    fuse.fuse(model)
    assert len(norms) > 2 and {path for path, kind in stand_ins(model).items() if kind is FrozenRmsNorm} == norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_that_clamps_its_gate_is_not_fused(dtype: torch.dtype) -> None:
    """DeepSeek-V4's clamps at 10, which activations of random weights do not reach."""
    config = transformers.DeepseekV4Config(hidden_size=32, intermediate_size=48, swiglu_limit=10.0)
    torch.manual_seed(0)
    mlp = modeling_deepseek_v4.DeepseekV4MLP(config).requires_grad_(False).to(dtype)
    model = nn.ModuleDict({"mlp": mlp})
    assert float(mlp.gate_proj(torch.randn(8, 32, dtype=dtype)).abs().max()) < 10
    assert fuse.fuse(model) == 0
    mlp.limit = 1e9
    assert fuse.fuse(model) == 1


def test_a_norm_that_is_kept_in_another_dtype_is_not_fused(tmp_path: Path) -> None:
    """DeepSeek-V4 keeps its norms in fp32, and they return the model's bf16: the next product would not take fp32."""
    text = loaded(saved("deepseek_v4", tmp_path).parent, "bfloat16", "eager")
    norms = [module for module in text.model.modules() if type(module).__name__ == "DeepseekV4RMSNorm"]
    assert norms and {module.weight.dtype for module in norms} == {torch.float32} and text.model.dtype == torch.bfloat16
    before = text.head(text.hidden(pack_examples(rows())))
    fuse.fuse(text.model)
    assert not any(isinstance(module, FrozenRmsNorm) for module in text.model.modules())
    torch.testing.assert_close(text.head(text.hidden(pack_examples(rows()))), before)


def test_eject_takes_the_stand_ins_out(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    before = {path: type(module) for path, module in model.named_modules()}
    prepared(model)
    assert fuse.fuse(model) > 0
    assert fuse.fuse(model) == 0
    inject.eject(model)
    assert {path: type(module) for path, module in model.named_modules()} == before


def stand_ins(model: Any) -> dict[str, type[Replacement]]:
    return {path: type(module) for path, module in model.named_modules() if isinstance(module, Replacement)}


@pytest.mark.parametrize("family", [*GATED, "phi3", "gpt2"])
def test_a_model_without_numbers_gets_the_same_stand_ins(tiny_model: Callable[..., Any], family: str) -> None:
    real = tiny_model(family)
    prepared(real)
    count = fuse.fuse(real)
    with FakeTensorMode():
        planned = tiny_model(family)
        prepared(planned)
        state = torch.get_rng_state()
        assert fuse.fuse(planned) == count
    assert stand_ins(planned) == stand_ins(real)
    assert torch.equal(torch.get_rng_state(), state), "probing a planned model must draw no random numbers"


@pytest.mark.parametrize(("family", "fused"), [("llama", 2), ("qwen3", 2), ("gemma3", 0), ("phi3", 0)])
def test_attention_is_fused_where_its_norms_are_those_that_it_knows(family: str, fused: int, tmp_path: Path) -> None:
    """Gemma 3 norms its heads too, but with 1 + w."""
    text = load_text_model(ModelSpec(path=str(save_tiny_llama(tmp_path, family=family)), dtype="float32", device="cpu"))
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=2), text.family), seed=0)
    assert sum(isinstance(module, RotaryAttention) for module in text.model.modules()) == fused


@pytest.mark.parametrize("beside", [False, True])
def test_a_small_copy_takes_one_core_beside_other_processes(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    small = fuse.small_copy
    monkeypatch.setattr(fuse, "small_copy", lambda module: threads.append(torch.get_num_threads()) or small(module))
    fuse._FOUND.clear()
    before = torch.get_num_threads()
    compute_with(2)
    try:
        with forks_allowed() if beside else nullcontext(), Ledger():
            dtype = torch.float32
            fuse.fuse(model_from_config(config_from_settings(SMALL), name="small", dtype=dtype, products=dtype).model)
        assert set(threads) == ({1} if beside else {2}) and torch.get_num_threads() == 2
    finally:
        compute_with(before)


def test_a_norm_that_rounds_elsewhere_has_no_attention_fused(tmp_path: Path) -> None:
    text = load_text_model(ModelSpec(path=str(save_tiny_llama(tmp_path, family="qwen3")), dtype="bfloat16", device="cpu"))

    class Late(nn.Module):
        """w·x̂ rounded once, where FrozenRmsNorm rounds x̂ before."""

        def __init__(self, own: Any) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand_like(own.weight), requires_grad=False), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return (self.weight.float() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    for layer in text.model.model.layers:
        layer.self_attn.q_norm = Late(layer.self_attn.q_norm)
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=2), text.family), seed=0)
    assert not any(isinstance(module, RotaryAttention) for module in text.model.modules())
