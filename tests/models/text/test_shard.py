"""`models.shard`: a parted model computes the same bits as a whole one, and each process keeps its part only."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack_examples
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.trained_block import BlockCall
from lorakeet.models.generate.sample import sample
from lorakeet.models.inject import trained_parameters
from lorakeet.models.modules import block_prefix, find, unwrapped
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.shard import shard_blocks, whole
from lorakeet.quant.spec import QuantSpec
from lorakeet.train import processes as module
from lorakeet.train.launch import launched
from lorakeet.train.processes import joined
from lorakeet.train.text.loss import text_loss
from tiny.gguf_file import write_tiny_gguf
from tiny.gptq_folder import save_mixed_gptq
from tiny.models import save_tiny_llama
from tiny.together import Together


def batch() -> Batch:
    """Rows of so many tokens on average that the C library's attention is the faster one (kernels/cpu/attention.TILED)."""
    rows = [Example(np.arange(4 + n, 34 + 2 * n), np.arange(30 + n) >= 8, str(n), None, False) for n in range(3)]
    return pack_examples(rows)


def computed(text: TextModel) -> tuple[float, dict[str, torch.Tensor], list[list[int]]]:
    """The loss of a step of two micro-batches, its gradients, and what the model writes."""
    text.model.train()
    loss = torch.zeros(())
    for _ in range(2):
        loss, _ = text_loss(text, batch())
        loss.backward()  # type: ignore[no-untyped-call]
    parameters = trained_parameters(text.model)
    grads = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return loss.item(), grads, [ids.tolist() for ids in sample(text, [[5, 6]], max_tokens=4)]


def in_this_process(folder: str, method: str, layers: str, dtype: str = "float32") -> dict[str, Any]:
    """What is the same before and after the blocks were parted, and how much of them is kept."""
    with joined(launched()) as processes:
        quantize = QuantSpec(method=method)  # type: ignore[arg-type]
        spec = ModelSpec(path=folder, dtype=dtype, products=dtype, device="cpu", quantize=quantize)  # type: ignore[arg-type]
        text = load_text_model(spec)
        plan = plan_for(text.model, LoraSpec(rank=4, alpha=12.0, layers=layers), text.family)
        initialise_adapter(text, plan, seed=1)
        with torch.no_grad():
            for name, parameter in trained_parameters(text.model).items():
                if name.endswith(".B"):
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        counted = mock.patch.object(BlockCall, "forward", autospec=True, side_effect=BlockCall.forward)
        with counted as blocks:
            digests, before = frozen_digests(text.model), computed(text)
        sizes = {name: p.numel() for name, p in text.model.named_parameters()}
        text = shard_blocks(text, processes.count, torch.device("cpu"))
        with counted as blocks_parted:
            after = computed(text)
        parted = {name: p for name, p in text.model.named_parameters() if isinstance(p, DTensor)}
        found = {
            "loss": before[0] == after[0],
            "in C": [blocks.call_count, blocks_parted.call_count],
            "gradients": len(before[1]) > 4 and all(torch.equal(before[1][name], grad) for name, grad in after[1].items()),
            "texts": before[2] == after[2],
            "digests": frozen_digests(text.model) == digests,
            "kept": sum(p.to_local().numel() for p in parted.values()) / sum(p.numel() for p in parted.values()),
            "codes": sum(p.numel() for p in parted.values() if not p.is_floating_point()),
            "whole": sorted({name.rpartition(".")[2] for name in sizes.keys() - parted.keys() if "layers." in name}),
        }
        processes.disband()
        return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
@pytest.mark.parametrize("layers", ["all", "top:1"])
def test_a_sharded_model_computes_the_same_bits(forked: Together, tiny_llama_folder: Path, method: str, layers: str) -> None:
    for found in forked.call("models.text.test_shard:in_this_process", str(tiny_llama_folder), method, layers):
        assert found["loss"] and found["gradients"] and found["texts"] and found["digests"], found
        assert 0.45 <= found["kept"] <= 0.55, found
        assert (found["codes"] > 0) == (method != "none")
        assert found["whole"] == ["A", "B"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_so_it_does_in_bf16_for_which_a_whole_model_has_kernels(forked: Together, tmp_path: Path, method: str) -> None:
    """Heads of 64 numbers, so that the C library would compute whole blocks: of parted ones it sees no weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = save_tiny_llama(tmp_path / "model", **sizes)
    for found in forked.call("models.text.test_shard:in_this_process", str(folder), method, "all", "bfloat16"):
        assert found["loss"] and found["gradients"] and found["texts"] and found["digests"], found
        assert 0.45 <= found["kept"] <= 0.55 and (found["codes"] > 0) == (method != "none"), found
        assert (found["in C"][0] > 0) == operators.in_use() and found["in C"][1] == 0, found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_so_it_does_with_stacked_experts_packed_or_not(forked: Together, tmp_path: Path, method: str) -> None:
    folder = save_tiny_llama(tmp_path / "model", family="mixtral")
    for found in forked.call("models.text.test_shard:in_this_process", str(folder), method, "all"):
        assert found["loss"] and found["gradients"] and found["texts"] and found["digests"], found
        assert 0.45 <= found["kept"] <= 0.55 and (found["codes"] > 0) == (method != "none"), found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_it_does_over_a_gptq_folder(forked: Together, tmp_path: Path, dtype: str) -> None:
    """Of every number of bits and every group size, with columns in their order and out of it."""
    save_mixed_gptq(tmp_path / "model", "gptq")
    answers = forked.call("models.text.test_shard:in_this_process", str(tmp_path / "model"), "none", "all", dtype)
    assert sum(found["kept"] for found in answers) == pytest.approx(1)
    for found in answers:
        assert found["loss"] and found["gradients"] and found["texts"] and found["digests"], found
        assert 0.4 <= found["kept"] <= 0.6 and found["codes"] > 0, found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_it_does_over_a_gguf_file_in_its_own_blocks(forked: Together, tmp_path: Path, dtype: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    write_tiny_gguf(tmp_path / "model.gguf", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"], **sizes)
    for found in forked.call("models.text.test_shard:in_this_process", str(tmp_path / "model.gguf"), "gguf", "all", dtype):
        assert found["loss"] and found["gradients"] and found["texts"] and found["digests"], found
        assert 0.4 <= found["kept"] <= 0.6 and found["codes"] > 0, found


@pytest.mark.slow
def test_three_processes_have_uneven_parts(forked: Together, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", hidden_size=40, intermediate_size=56)
    answers = forked.call("models.text.test_shard:in_this_process", str(folder), "none", "all", count=3)
    assert all(found["loss"] and found["gradients"] and found["digests"] for found in answers), answers
    assert sum(found["kept"] for found in answers) == pytest.approx(1)


def test_a_plain_tensor_is_whole_as_it_is() -> None:
    tensor = torch.zeros(3)
    assert whole(tensor) is tensor


def passing_until_one_dies(folder: str) -> str:
    """The message in this process."""
    module.ROLL_CALL = 1.0
    try:
        with joined(launched()) as processes:
            text = load_text_model(ModelSpec(path=folder, dtype="float32", device="cpu"))
            initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4, alpha=12.0), text.family), seed=1)
            shard_blocks(text, processes.count, torch.device("cpu"))
            for number in range(3):
                if number == 2 and processes.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                with processes.gathering():
                    text_loss(text, batch())[0].backward()  # type: ignore[no-untyped-call]
    except module.ProcessLost as lost:
        return str(lost)
    return "nothing"


@pytest.mark.slow
def test_one_that_dies_within_a_pass_is_named(forked: Together, tiny_llama_folder: Path) -> None:
    forked.start({"count": 2, "call": "models.text.test_shard:passing_until_one_dies", "with": [str(tiny_llama_folder)]})
    survivor, victim = forked.end()
    assert victim.code == -signal.SIGKILL
    assert survivor.answered.strip() == '"process 1 of 2 died"', survivor.said


def failing_by_itself() -> str:
    """What an error of the first process's own is told as, in this process."""
    try:
        with joined(launched()) as processes:
            if not processes.first:
                return _told(processes)
            with processes.gathering():
                raise RuntimeError("no memory")
    except RuntimeError as error:
        return str(error)
    return "nothing"


def _told(processes: module.Processes) -> str:
    try:
        with processes.gathering():
            torch.distributed.all_reduce(torch.zeros(1))
    except module.ProcessLost as lost:
        return str(lost)
    return "nothing"


def test_an_error_of_its_own_within_a_pass_stays_what_it_is(forked: Together) -> None:
    told = forked.call("models.text.test_shard:failing_by_itself")
    assert told == ["no memory", "process 0 of 2 gave up (RuntimeError: no memory)"]


def order_of_gathering(folder: str) -> list[str]:
    """What a pass and its backward pass do: "gather n" as the weights of block n are asked for, "compute n" as it begins."""
    with joined(launched()) as processes:
        text = load_text_model(ModelSpec(path=folder, dtype="float32", products="float32", device="cpu"))
        initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4), text.family), seed=1)
        text = shard_blocks(text, processes.count, torch.device("cpu"))
        prefix, count = block_prefix(text.model, text.family)
        blocks = [unwrapped(cast(nn.Module, find(text.model, f"{prefix}.{number}"))) for number in range(count)]
        groups: dict[int, int] = {}
        for number, block in enumerate(blocks):
            groups[id(cast(Any, block)._get_fsdp_state()._fsdp_param_group)] = number
            block.register_forward_pre_hook(lambda *_, number=number: found.append(f"compute {number}"))
        found: list[str] = []
        own = FSDPParamGroup.unshard

        def unshard(group: Any, async_op: bool = False) -> None:
            if group._sharded_state.name != "UNSHARDED" and group._all_gather_result is None and id(group) in groups:
                found.append(f"gather {groups[id(group)]}")
            own(group, async_op)

        with mock.patch.object(FSDPParamGroup, "unshard", unshard):
            text.model.train()
            loss, _ = text_loss(text, batch())
            forward = list(found)
            found.clear()
            loss.backward()  # type: ignore[no-untyped-call]
        processes.disband()
        return [*forward, "back", *found]


@pytest.mark.slow
def test_a_block_is_gathered_while_its_neighbour_computes(forked: Together, tmp_path: Path) -> None:
    """Each way: the next block is asked for before this one begins."""
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=4)
    for found in forked.call("models.text.test_shard:order_of_gathering", str(folder)):
        turn = found.index("back")
        forward, back = found[:turn], [each for each in found[turn + 1 :] if each.startswith("gather")]
        for number in range(3):
            assert forward.index(f"gather {number + 1}") < forward.index(f"compute {number}"), forward
        assert back == sorted(back, reverse=True) and "gather 0" in back, found
