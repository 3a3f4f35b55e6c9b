"""Limits the machine code that oneDNN caches for matrix products on a CPU.

oneDNN compiles about 0.6 MiB of code for each new shape of a narrow product and caches the last 1,024. A training step has about
25 shapes for every number of tokens, so that rows of many lengths grow a process by hundreds of MiB. About half of a product's
code stays even after oneDNN has dropped it (planning/forecast_text_run counts it).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SERVING = 512  # cached products of a server, whose batches have every size and whose steps take tens of milliseconds
TRAINING = 64  # cached products: more than a micro-batch needs in one block, so that each is compiled once a micro-batch
_CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # oneDNN's developer guide, "Primitive Cache"


def limit_code_cache(products: int = TRAINING, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the number of products that oneDNN caches code for, unless `environment` or an earlier call has set it.

    oneDNN reads it at the first product of a process only. Compiling a product again takes about 0.5 ms.
    """
    if not any(name in environment for name in _CAPACITY):
        environment[_CAPACITY[0]] = str(products)
