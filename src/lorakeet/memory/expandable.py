"""torch's allocator on CUDA devices: segments that grow, so that freed memory of one size serves another. Imports no torch.

Micro-batches differ in size. With segments of fixed sizes, what one has freed may serve no later one, and memory runs out while
some of it is unused. torch reads the setting when CUDA starts; Windows has no such segments.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

NAME, SETTING = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
OTHER_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # which torch reads before it


def use_expandable_segments(environment: MutableMapping[str, str], platform: str = sys.platform) -> None:
    """Asks torch for them, unless the user has set any of these variables."""
    if platform == "linux" and not any(name in environment for name in (NAME, *OTHER_NAMES)):
        environment[NAME] = SETTING
