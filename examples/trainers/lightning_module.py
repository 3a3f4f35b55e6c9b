"""Pairs of Lorakeet on a model that Lightning trains. Needs: pip install 'lorakeet[trainers]'

python examples/trainers/lightning_module.py [MODEL] [OUT]        # a folder or hub id
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakeet as lk


class Adapted(lightning.LightningModule):
    """A language model of which only the attached pairs are trained."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(lk.parameters(self.net), lr=2e-3)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
    out = sys.argv[2] if len(sys.argv) > 2 else "adapters/lightning-module"
    tokenizer = AutoTokenizer.from_pretrained(name)
    net = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    texts = [f"{day} May 2026. Date: 2026-05-{day:02}" for day in range(1, 9)]
    rows = [torch.tensor(tokenizer(text).input_ids) for text in texts]

    lk.attach(net, lk.Lora(rank=8, target_modules=("q_proj", "v_proj")))
    adapted = Adapted(net)
    trainer = lightning.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(adapted, torch.utils.data.DataLoader(rows, batch_size=1))
    print(f"loss {adapted.losses[0]:.3f} → {adapted.losses[-1]:.3f}")
    lk.adapter_of(net, base=name).write(out)


if __name__ == "__main__":
    main()
