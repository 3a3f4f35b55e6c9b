"""The code that oneDNN makes for matrix products on a CPU, and how much of it stays.

oneDNN writes machine code for each shape of a narrow product that it meets, about 0.6 MiB, and keeps that of the last 1,024. A
training step has some twenty-five shapes for every number of tokens, so that rows of many lengths leave a process hundreds of
MiB larger. About half of a product's code stays even when oneDNN has let the product go (workflows/planning/forecast_text_run
allows for it).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SERVED = 512  # products, where batches of every size come and go in steps of tens of milliseconds
KEPT = 64  # products: above those of one micro-batch on its way through a block, so that each is made once a micro-batch
_CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # oneDNN's developer guide, "Primitive Cache"


def limit_code_cache(products: int = KEPT, environment: MutableMapping[str, str] = os.environ) -> None:
    """Has oneDNN keep code for so many products, unless `environment` says otherwise; whoever comes first is heeded.

    oneDNN reads it at the first product in a process, and never again; making the code anew takes about 0.5 ms a product.
    """
    if not any(name in environment for name in _CAPACITY):
        environment[_CAPACITY[0]] = str(products)
