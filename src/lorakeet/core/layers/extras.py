"""Trained parts that are not pairs: copies of whole modules, and embedding rows of new tokens."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.layers.linear import AdaptedLayer, embed_scale


class TrainedModule(AdaptedLayer):
    """A module (a classification head, a norm) of which each adapter has its own copy, in fp32."""

    def new_copy(self) -> nn.Module:
        """A trainable fp32 copy of the original."""
        trained = copy.deepcopy(self.original)
        for module in trained.modules():  # not .float(), which swaps tensors in place and fails for tensors without numbers
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().float()))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.float() if buffer.is_floating_point() else buffer)
        return trained

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.current().weight)

    def current(self) -> nn.Module:
        """The copy in use, or the original."""
        self.require_undivided("modules trained whole")
        active = self.active
        return self.original if active is None else self.adapters[active]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        current = self.current()
        if current is self.original:
            return current(x, *args, **kwargs)
        y = current(x.float() if x.is_floating_point() else x, *args, **kwargs)
        dtype = x.dtype if x.is_floating_point() else next(self.original.parameters()).dtype
        return y.to(dtype) if isinstance(y, Tensor) else y


class TrainedRows(nn.Module):
    """Trained rows of an embedding, for the token ids `ids` (rows,): values (rows, hidden).

    `tokens` are their texts and `tied` the path of the head that shares them, kept for the adapter on disk.
    """

    ids: Tensor

    def __init__(self, ids: tuple[int, ...], values: Tensor, *, tokens: tuple[str, ...] = (), tied: str = "") -> None:
        super().__init__()
        self.tokens, self.tied = tokens, tied
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.int64, device=values.device))
        self.values = nn.Parameter(values.detach().clone().float())

    def slots(self, ids: Tensor) -> Tensor:
        """The row number of each id, or −1 for an id without a trained row."""
        matches = ids.unsqueeze(-1) == self.ids  # (…, rows)
        return torch.where(matches.any(-1), matches.int().argmax(-1), -1)


class TokenRowsLayer(AdaptedLayer):
    """An embedding or a head with trained rows; `rows_before` is how many it had before tokens were added."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.rows_before = self.weight.shape[0]


class TokenRowsEmbedding(TokenRowsLayer):
    """An embedding of which only the rows of some tokens are trained."""

    def forward(self, ids: Tensor) -> Tensor:
        self.require_undivided("rows of tokens")
        y = cast(Tensor, self.original(ids))
        if self.active is None:
            return y
        rows = cast(TrainedRows, self.adapters[self.active])
        slots = rows.slots(ids)
        trained = (rows.values[slots.clamp_min(0)] * embed_scale(self.original)).to(y.dtype)
        return torch.where((slots >= 0).unsqueeze(-1), trained, y)


class TokenRowsHead(TokenRowsLayer):
    """An output head with trained rows, its own or those of a tied embedding: their logits come from the rows."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.require_undivided("rows of tokens")
        logits = cast(Tensor, self.original(hidden))
        if self.active is None:
            return logits
        rows = cast(TrainedRows, self.adapters[self.active])
        own = hidden @ rows.values.t().to(hidden.dtype)  # (…, rows)
        return logits.index_copy(-1, rows.ids, own.to(logits.dtype))
