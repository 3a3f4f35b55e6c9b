"""Where the native library cannot be had its tests are left out, and say why."""

from __future__ import annotations

import pytest

from lorakeet.kernels.cpu.compile import why_not

needs_native = pytest.mark.skipif(bool(why_not()), reason=f"no native library: {why_not()}")
