"""A frozen causal language model in two halves, so that the head runs only where a token is to be predicted.

    ids ──► hidden(batch): decoder ──► (targets, hidden) ──► head(…) in chunks ──► (chunk, vocabulary)

Two layouts give the same numbers: rows laid end to end (attention varlen) and rows padded on the right (sdpa, eager). Padding
on the right needs no mask, since a causal model never looks ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.fused.attention import RotaryAttention
from lorakeet.core.fused.flash_varlen_recorded import RowOffsets
from lorakeet.core.fused.mlp_and_norm import GatedMlp
from lorakeet.core.fused.packed_attention import TILED, native_serves
from lorakeet.core.layers.linear import AdaptedLayer
from lorakeet.core.reordered import ReorderedLinear
from lorakeet.core.tiled_product import RowSource, tiled_product
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches
from lorakeet.data.prefix import PASS, BatchLimits, PrefixLayout, prefix_batches, shared_layout, unshared_layout
from lorakeet.kernels.tiled_weight import Kernels
from lorakeet.memory.store import WeightStore
from lorakeet.models import modules
from lorakeet.models.attention import VARLEN
from lorakeet.models.families import Family
from lorakeet.models.frozen_prefix import FrozenPrefix
from lorakeet.models.streaming.model import Streamed, StreamedHead
from lorakeet.quant.packed import PackedLinear

WHOLE = 32  # tokens of a varlen batch are filled up to a multiple at least: products are slower on others
TIMES = 8  # as many tokens rows of a batch may have in all as are computed: ids and places of all of them are held
READ = 1 << 30  # tokens that a pass costs which reads or gathers all weights: more than any step has
COUNTS = 8  # of tokens between a power of two and the next: narrow products leave code behind for every one (memory/onednn_code)


def padded_count(tokens: int, *, few_counts: bool) -> int:
    """The whole number that `tokens` are filled up to; with `few_counts` one of COUNTS between two powers of two, at most."""
    below = 1 << max(tokens - 1, 1).bit_length() - 1
    return tokens + -tokens % max(WHOLE, below // COUNTS if few_counts else 0)


@dataclass
class TextModel:
    """A transformers model for text with what belongs to it. `models/text/load` makes it."""

    model: Any  # the transformers …ForCausalLM, frozen, in eval mode unless training
    tokenizer: Any
    name: str  # as the user named it; an adapter keeps it as the name of its base
    source: Path  # the folder with config.json, safetensors and tokenizer
    family: Family
    device: torch.device
    dtype: torch.dtype  # of the frozen weights
    products: torch.dtype  # of the matrix products over them (core/precision)
    kernels: Kernels | None = None  # Triton's over the frozen weights, where they are asked for (core/kernels)
    streamed: Streamed | None = None  # where the frozen blocks come in from a store
    shares_prefix: bool = True  # whether tokens that all rows begin with are computed once: not where dropout differs by row
    gathers: bool = False  # whether every pass gathers the blocks from several processes
    sees_every_token: bool = False  # set by `every_token`
    fills_every_token: bool = False  # whether there is filler nevertheless; set by `every_token`
    begins_kept: bool = True  # whether rows whose states are kept begin with these; set by `every_token`
    prefix: FrozenPrefix | None = None  # the states of rows below the lowest trained block, where they are kept

    @property
    def attention(self) -> str:
        """varlen, sdpa or eager: what the model attends with."""
        set_to = str(self.model.config._attn_implementation)
        return "varlen" if set_to == VARLEN else set_to

    def learn(self) -> None:
        """Training mode, where it is another: setting it is a walk over all modules, and every micro-batch asks for it."""
        if not self.model.training:
            self.model.train()

    @property
    def context(self) -> int | None:
        """The most tokens that a row may have, where the model sets a limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def hidden(self, batch: Batch) -> Tensor:
        """The decoder's last hidden states where a target is to be predicted, (targets, hidden), with gradient if enabled.

        Tokens that all rows begin with pass through the model once, filler makes their number whole, and the last block computes
        only what is read of it; within `every_token` it is as that says.
        """
        batch = batch.to(self.device)
        if self.attention == "varlen":
            laid = self.laid(batch)
            filler = batch.ids.new_zeros(self.filled(len(laid.ids)) - len(laid.ids))
            with self.last_block_at(laid), self._from_kept_states(batch, laid, len(filler)):
                states = self._decode(
                    torch.cat([laid.ids, filler])[None],
                    position_ids=torch.cat([laid.positions, filler])[None],
                    row_lengths=laid.lengths,
                    row_prefix=laid.prefix,
                    row_products=self.products,
                )
            return states[0].index_select(0, laid.target_positions)
        padded, places = _padded(batch, self._pad)
        states = self._decode(padded)
        return states.flatten(0, 1).index_select(0, places[batch.target_positions])

    def placed_states(self, ids: Tensor, positions: Tensor, places: RowOffsets) -> Tensor:
        """The decoder's last hidden states of every token (tokens, hidden), with gradient if enabled; ids, positions (tokens,).

        What it does depends on numbers at the addresses of the three and of what the model holds alone: it can be recorded.
        Raises EnvironmentProblem where the attention cannot be told of places so.
        """
        rows = {"row_lengths": (places.longest,), "row_places": places, "row_products": self.products}
        return self._decode(ids[None], position_ids=positions[None], **rows)[0]

    def filled(self, tokens: int) -> int:
        """How many tokens pass through the model together, filler included, where `tokens` of them, end to end, count."""
        if self.sees_every_token and not self.fills_every_token:
            return tokens
        return padded_count(tokens, few_counts=self.products != torch.float32)

    def _from_kept_states(self, batch: Batch, laid: PrefixLayout, filler: int) -> AbstractContextManager[None]:
        """A context in which the blocks below the lowest trained one hand on what is kept, where all rows of the batch are."""
        if self.prefix is None or not self.begins_kept:
            return nullcontext()
        states = self.prefix.states_of(batch.ids, batch.lengths, laid.prefix)
        if states is None:
            return nullcontext()
        whole = nn.functional.pad(states, (0, 0, 0, filler)).to(self.device)
        return self.prefix.handing_on(whole[None])

    @contextmanager
    def every_token(self, *, but_kept: bool = False, filled: bool = False) -> Iterator[None]:
        """A context in which every token of a batch passes through every part of the model, and no other, but for filler behind
        them if `padded_count`: for whoever watches or divides what passes through it. With `but_kept`, rows whose states are
        kept pass through the parts above alone."""
        before = self.sees_every_token, self.begins_kept, self.fills_every_token
        self.sees_every_token, self.begins_kept, self.fills_every_token = True, but_kept, filled
        try:
            yield
        finally:
            self.sees_every_token, self.begins_kept, self.fills_every_token = before

    def laid(self, batch: Batch) -> PrefixLayout:
        """The batch as the model sees it where rows lie end to end."""
        return shared_layout(batch) if self._begins_once else unshared_layout(batch)

    @property
    def _begins_once(self) -> bool:
        return self.shares_prefix and not self.sees_every_token

    def micro_batches(self, rows: Sequence[Example], max_tokens: int) -> list[Batch]:
        """The rows of a step in batches of which at most `max_tokens` tokens are computed at once; a longer row stands alone.

        What all rows of a batch begin with counts once where it is computed once. Only Lorakeet's own attention makes no copy of
        it for each row; where another computes, a batch has no more tokens in all than may be computed.
        """
        if not self._begins_once or self.attention != "varlen":
            return micro_batches(rows, max_tokens)
        times = TIMES if self._copies_nothing([len(row.ids) for row in rows]) else 1
        a_pass = READ if self.gathers or self.streamed is not None else PASS
        return prefix_batches(rows, BatchLimits(max_tokens, times, a_pass))

    def _copies_nothing(self, lengths: Sequence[int]) -> bool:
        """Whether attention of any rows of so many tokens is Lorakeet's own kernel (core/fused/packed_attention.NativeRows)."""
        attention = next((part for part in self._last_parts() if isinstance(part, RotaryAttention)), None)
        if attention is None or min(lengths, default=0) < TILED or attention.looks_back_less(max(lengths)):
            return False
        return native_serves(self.dtype, cast(Any, attention.original).head_dim, self.products, self.device)

    @contextmanager
    def last_block_at(self, laid: PrefixLayout) -> Iterator[None]:
        """A context in which the fused parts of the last block compute only what is read of it: the tokens that predict a target.

        Everything before it needs every token, for the keys and values of those that follow.
        """
        few = not self.sees_every_token and 2 * len(laid.target_positions) < len(laid.ids)
        parts = self._last_parts() if few else []
        if parts:
            only = torch.unique(laid.target_positions) if laid.prefix else laid.target_positions
            for part in parts:
                part.only = only
        try:
            yield
        finally:
            for part in parts:
                part.only = None

    @cached_property
    def _blocks(self) -> tuple[str, int]:
        return modules.block_prefix(self.model, self.family)

    def _last_parts(self) -> list[GatedMlp | RotaryAttention]:
        prefix, count = self._blocks
        last = modules.find(self.model, f"{prefix}.{count - 1}") if count else None
        return [] if last is None else list(_parts_for_all_tokens(last))

    def head(self, hidden: Tensor) -> Tensor:
        """(n, hidden) to the model's logits (n, vocabulary), with the family's factor, divisor and soft cap.

        Where products run in another dtype than the weights are stored in, the logits keep the products' dtype: rounded to
        bf16, close answers would tie.
        """
        weight, layer = self._plain_head_weight, self.model.get_output_embeddings()
        if isinstance(layer, (PackedLinear, ReorderedLinear)):
            logits = cast(Tensor, layer(hidden.to(self.products)))
        elif weight is not None:
            logits = tiled_product(hidden.to(self.products), weight)
        else:
            logits = cast(Tensor, layer(hidden))
        config = self.model.config.get_text_config()
        if self.family.logit_factor:
            logits = logits * getattr(config, self.family.logit_factor)
        if self.family.logit_divisor:
            logits = logits / getattr(config, self.family.logit_divisor)
        cap = getattr(config, self.family.soft_cap, None) if self.family.soft_cap else None
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def head_weight(self) -> RowSource | None:
        """The frozen (vocabulary, hidden) weight when logits are exactly hidden·Wᵀ, without bias, cap or adapter; else None."""
        shaped = self.family.logit_factor or self.family.logit_divisor
        cap = self.family.soft_cap and getattr(self.model.config.get_text_config(), self.family.soft_cap, None) is not None
        return None if shaped or cap else self._plain_head_weight

    @property
    def _plain_head_weight(self) -> RowSource | None:
        """The frozen weight of a head that is an nn.Linear without bias and without active adapter; else None."""
        layer = self.model.get_output_embeddings()
        if isinstance(layer, StreamedHead):
            return layer.rows
        if isinstance(layer, AdaptedLayer):
            if layer.in_use:
                return None
            layer = layer.original
        plain = type(layer) is nn.Linear and layer.bias is None and not layer.weight.requires_grad
        return layer.weight.detach() if plain else None

    @property
    def store(self) -> WeightStore | None:
        """Where the frozen weights of a streamed model lie."""
        return None if self.streamed is None else self.streamed.stream.store

    def release(self) -> None:
        """Takes the blocks of a streamed model out of memory; they come in again when it computes."""
        if self.streamed is not None:
            self.streamed.stream.release()

    def add_tokens(self, tokens: tuple[str, ...]) -> tuple[int, ...]:
        """Adds `tokens` to the tokenizer and returns their ids, for `inject(…, token_ids=…)`; ones it has keep their id."""
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        return tuple(int(number) for number in self.tokenizer.convert_tokens_to_ids(list(tokens)))

    @property
    def _pad(self) -> int:
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return 0 if pad is None or pad < 0 else int(pad)

    def _decode(self, ids: Tensor, **arguments: Any) -> Tensor:
        """ids (rows, tokens) to the decoder's last hidden states (rows, tokens, hidden)."""
        output = self.model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **arguments)
        return cast(Tensor, output.last_hidden_state)


def _parts_for_all_tokens(module: nn.Module) -> Iterator[GatedMlp | RotaryAttention]:
    """The fused parts within a block that stand there once. One of several in a list may get some tokens only (experts), or give
    what a later one attends to (two attentions in a block)."""
    for child in module.children():
        if isinstance(child, (GatedMlp, RotaryAttention)):
            yield child
        elif not isinstance(child, nn.ModuleList):
            yield from _parts_for_all_tokens(child)


def token_logprobs(text: TextModel, batch: Batch, *, chunk: int = 256) -> Tensor:
    """log p of each target (targets,), fp32, without gradient; the head runs on `chunk` targets at a time."""
    found = []
    targets = batch.target_ids.to(text.device)
    for start, logits in zip(range(0, batch.targets, chunk), target_logits(text, batch, chunk=chunk), strict=True):
        exact = logits.float()
        chosen = exact.gather(1, targets[start : start + chunk, None])
        top = exact.amax(1, keepdim=True)
        norm = exact.sub_(top).exp_().sum(1, keepdim=True)  # in place: torch's logsumexp makes another (chunk, vocabulary)
        found.append((chosen - top - norm.log()).squeeze(1))
    return torch.cat(found) if found else torch.empty(0, device=text.device)


def target_logits(text: TextModel, batch: Batch, *, chunk: int = 256) -> Iterator[Tensor]:
    """The logits (chunk, vocabulary) at the targets, chunk after chunk, in the model's dtype and without gradient."""
    if not batch.targets:
        return
    with torch.no_grad():
        hidden = text.hidden(batch)
    for part in hidden.split(chunk):  # type: ignore[no-untyped-call]
        with torch.no_grad():
            logits = text.head(part)
        yield logits


def _padded(batch: Batch, pad: int) -> tuple[Tensor, Tensor]:
    """The rows padded on the right (rows, longest), and where in it, flattened, each token of the batch stands (tokens,)."""
    longest = max(batch.lengths)
    places = batch.rows_of_tokens * longest + batch.positions
    padded = torch.full((len(batch.lengths) * longest,), pad, dtype=torch.int64, device=batch.ids.device)
    return padded.index_copy(0, places, batch.ids).view(-1, longest), places
