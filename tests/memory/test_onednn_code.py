"""oneDNN told to keep little code: whoever said otherwise is obeyed, and products of many shapes leave a process smaller."""

from __future__ import annotations

import os

import pytest
import torch

from lorakeet.memory.onednn_code import TRAINING, limit_code_cache
from tiny.one_import import answers


def test_what_the_environment_says_stays() -> None:
    environment: dict[str, str] = {}
    limit_code_cache(environment=environment)
    assert environment == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(TRAINING)}
    limit_code_cache(7, environment)
    assert environment == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(TRAINING)}, "whoever comes first is heeded"
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        environment = {name: "7"}
        limit_code_cache(environment=environment)
        assert environment == {name: "7"}


IMPORTS = """
import torch
from lorakeet.memory.measure import resident_bytes
from lorakeet.models.placement import products_for
from lorakeet.models.spec import ModelSpec
"""
PROGRAM = """
{order}
weight = torch.ones(64, 64, dtype=torch.bfloat16)
torch.ones(8, 64, dtype=torch.bfloat16) @ weight
before = resident_bytes()
for tokens in range(16, 16 * 400, 16):
    torch.ones(tokens, 64, dtype=torch.bfloat16) @ weight
print(resident_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="oneDNN makes little code without bf16 products")
def test_products_of_many_shapes_leave_a_process_smaller() -> None:
    environment = {name: value for name, value in os.environ.items() if "PRIMITIVE_CACHE" not in name}
    orders = ("", "products_for(ModelSpec(), torch.bfloat16, torch.device('cpu'))")
    usual, little = map(int, answers(IMPORTS, [PROGRAM.format(order=order) for order in orders], environment))
    assert usual > 100 << 20, "if oneDNN no longer keeps hundreds of MiB, it need not be told"
    assert little < 0.8 * usual
