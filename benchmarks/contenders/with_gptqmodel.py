"""gptqmodel quantises a model folder on given token ids. Runs in an environment of its own, without Lorakeet.

    python with_gptqmodel.py MODEL IDS.json OUT BITS GROUP_SIZE [true|false]       writes OUT/; the last word is desc_act
    python with_gptqmodel.py --dense FOLDER OUT.safetensors                        writes the weights as it unpacks them, fp16
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def quantise(model: str, rows: str, out: str, bits: str, group_size: str, desc_act: str) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=int(bits), group_size=int(group_size), desc_act=desc_act == "true")
    ids = json.loads(Path(rows).read_text(encoding="utf-8"))
    loaded = GPTQModel.load(model, config)
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    loaded.save(out)


def dense(folder: str, out: str) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import save_file

    loaded = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    layers = {name: module for name, module in loaded.model.named_modules() if hasattr(module, "dequantize_weight")}
    save_file({name: module.dequantize_weight().t().contiguous() for name, module in layers.items()}, out)


if __name__ == "__main__":
    if sys.argv[1] == "--dense":
        dense(*sys.argv[2:])
    else:
        quantise(*sys.argv[1:])
