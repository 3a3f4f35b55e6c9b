"""liger-kernel's kernels in Triton's interpreter on the CPU, which stands for a GPU.

The interpreter has no libdevice: what the kernels call of it is written out for the length of a test.
"""

from __future__ import annotations

from typing import Any

import pytest

from lorakeet.kernels import choose, liger
from tiny.triton_device import COMPILED, behave_like_a_card


def interpreted(patch: pytest.MonkeyPatch) -> Any:
    """The module kernels/liger, which the table chooses on the CPU until `patch` is undone."""
    for name in ("triton", "liger_kernel"):
        pytest.importorskip(name, reason=f"{name}, of the extra lorakeet[cuda], is not installed")
    if COMPILED:
        pytest.skip("on a GPU tests/gpu runs these kernels")
    behave_like_a_card(patch)
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    from triton import language as tl

    patch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # noqa: PLW0108 - the interpreter exchanges tl.rsqrt
    patch.setattr(liger_kernel.ops.geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    patch.setattr(liger, "DEVICES", ("cuda", "cpu"))
    patch.setattr(choose, "CANDIDATES", {})
    liger.computes_the_same.cache_clear()
    return liger
