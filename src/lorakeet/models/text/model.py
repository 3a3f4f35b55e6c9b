"""A frozen causal language model in two halves, so that the head runs only where a token is to be predicted.

    ids ──► hidden(batch): decoder ──► (targets, hidden) ──► head(…) in chunks ──► (chunk, vocabulary)

Packed rows (attention varlen) and rows padded on the right (sdpa, eager) give the same numbers. Padding on the right needs no
mask, since a causal model never attends to later tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lorakeet.core.fused.attention import RotaryAttention
from lorakeet.core.fused.mlp_and_norm import GatedMlp
from lorakeet.core.layers.linear import AdaptedLayer
from lorakeet.core.reordered import ReorderedLinear
from lorakeet.core.tiled_product import RowSource, tiled_product
from lorakeet.data.chat import Example
from lorakeet.data.locate import PACKAGE
from lorakeet.data.pack import Batch, micro_batches, pack_examples
from lorakeet.data.prefix import PASS, BatchLimits, PrefixLayout, prefix_batches, shared_layout, unshared_layout
from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels.choose import attends_in_c
from lorakeet.kernels.cpu.attention import TILED
from lorakeet.kernels.host_copies import to_device, together_on
from lorakeet.memory.store import WeightStore
from lorakeet.models import modules
from lorakeet.models.attention import VARLEN, chooses_beyond, temperature_start
from lorakeet.models.families import CONTEXT, Family, LogitScaling
from lorakeet.models.files.origin import packed_folder
from lorakeet.models.frozen_prefix import FrozenPrefix, PrefixBlock
from lorakeet.models.row_rotary import RowRotary, lengths_differ, separated, switch_length
from lorakeet.models.streaming.model import NotStreamed, StreamedBlocks, StreamedHead
from lorakeet.models.text.row_masks import masks_by_kind
from lorakeet.models.text.tiled_loss import is_read_in_tiles, tiled_losses
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.safetensors_layout import GGUF_METHOD

MULTIPLE = 32  # the least multiple that the tokens of a packed batch are padded to: products are slower on other counts
TIMES = 8  # tokens of a batch's rows in all, as a multiple of the computed ones: ids and positions of all are in memory
READ = 1 << 30  # cost in tokens of a pass that reads or gathers all weights: more than any step has
COUNTS = 8  # padded counts between two powers of two: narrow products keep machine code for each (memory/onednn_code)


def padded_count(tokens: int, *, few_counts: bool) -> int:
    """`tokens` rounded up to a multiple of MULTIPLE; with `few_counts` to one of at most COUNTS between two powers of two."""
    below = 1 << max(tokens - 1, 1).bit_length() - 1
    return tokens + -tokens % max(MULTIPLE, below // COUNTS if few_counts else 0)


def context_of(config: Any) -> int | None:
    """The most tokens of a row of the model with this configuration; None where it sets no limit."""
    own = config.get_text_config()
    limit = next((found for key in CONTEXT if (found := getattr(own, key, None)) is not None), None)
    return None if limit is None else int(limit)


def served_context_of(config: Any) -> int | None:
    """The most tokens of a text that the server writes: of longer ones the rotary frequencies would change on the way."""
    return min(filter(None, (context_of(config), switch_length(config))), default=None)


@dataclass(frozen=True)
class PassOptions:
    """How batches pass through a model. The default computes nothing twice and nothing that is not read."""

    share_prefix: bool = True  # compute tokens that all rows begin with once; False where dropout differs by row
    narrow_last_block: bool = True  # compute the last block only for tokens that predict a target
    pad: bool = True  # pad the number of tokens (`padded_count`)
    use_cached: bool = True  # start from cached hidden states where all rows of a batch have some (models/frozen_prefix)
    rows_apart: bool = True  # compute rows apart that would change each other; False in a plan, where together they hold more


@dataclass(frozen=True)
class TextModel:
    """A transformers model for text with what belongs to it, and how batches pass through it. `models/text/load` makes it."""

    model: Any  # the transformers …ForCausalLM, frozen, in eval mode unless training
    tokenizer: Any
    name: str  # as the user named it; an adapter keeps it as the name of its base
    source: Path  # the folder with config.json, safetensors and tokenizer
    family: Family
    device: torch.device
    dtype: torch.dtype  # of the frozen weights
    products: torch.dtype  # of the matrix products over them (core/precision)
    streamed: StreamedBlocks | None = None  # the blocks, where they are streamed from a store
    sharded: bool = False  # whether the blocks are sharded over processes, so that every pass gathers them
    options: PassOptions = PassOptions()
    why_not_varlen: str = ""  # what was found when its rows were packed at loading, where they cannot be
    masks_by_kind: bool = False  # whether its decoder takes a mask for each kind of layer (models/text/row_masks)

    def with_options(self, **changes: bool) -> TextModel:
        """The same model with other `options`."""
        return replace(self, options=replace(self.options, **changes))

    def with_every_token(self, *, cached: bool = False, pad: bool = False) -> TextModel:
        """The same model, with every token of a batch in every layer: for code that watches or divides the tokens of a layer.

        With `cached`, rows with cached hidden states skip the blocks below; with `pad`, padding follows the tokens.
        """
        return self.with_options(share_prefix=False, narrow_last_block=False, pad=pad, use_cached=cached)

    @property
    def attention(self) -> str:
        """The attention in use: varlen, sdpa or eager."""
        set_to = str(self.model.config._attn_implementation)
        return "varlen" if set_to == VARLEN else set_to

    @property
    def pads(self) -> bool:
        """Whether the attention in use pads the rows of a batch to its longest."""
        return self.attention != "varlen"

    @property
    def loadable_name(self) -> str:
        """The name by which transformers and PEFT's Auto classes load it: its folder, where it is named as a file or a package.

        A .gguf file whose blocks stay packed is none that they load, and keeps its name.
        """
        named = self.name.startswith(PACKAGE) or Path(self.name).expanduser().exists()
        if not named or Path(self.name).is_dir() or packed_folder(self.source) == GGUF_METHOD:
            return self.name
        return str(self.source)

    def train(self) -> None:
        """Sets training mode if it is off: setting it walks over all modules, and every micro-batch calls this."""
        if not self.model.training:
            self.model.train()

    @property
    def context(self) -> int | None:
        """The most tokens of a row, as in `context_of`."""
        return context_of(self.model.config)

    def hidden(self, batch: Batch) -> Tensor:
        """Returns the decoder's last hidden states at the positions that predict a target, (targets, hidden).

        With gradient if gradients are enabled. What is computed of the batch is up to `options`.
        """
        if len(apart := self._apart(batch.lengths)) > 1:
            return torch.cat([self.hidden(part) for part in batch.cut(apart)])
        batch = batch.to(self.device)
        if self.attention == "varlen":
            layout = self.layout(batch)
            contexts = self.narrowing_last_block(layout), self._from_cached_states(batch, layout), self._known_on_host(layout)
            with contexts[0], contexts[1], contexts[2], self._by_length(batch, layout):
                states = self._decode(
                    layout.ids[None],
                    position_ids=layout.positions[None],
                    row_lengths=layout.lengths,
                    row_prefix=layout.prefix,
                    row_products=self.products,
                )
            return states[0].index_select(0, layout.target_positions)
        longest = max(batch.lengths)
        places, of_targets = together_on(batch.padded_places(), self.device)
        blank = torch.full((len(batch.lengths) * longest,), self._pad, dtype=torch.int64, device=batch.ids.device)
        with self._by_length(batch):
            states = self._decode(blank.index_copy(0, places, batch.ids).view(-1, longest))
        return states.flatten(0, 1).index_select(0, of_targets)

    def computed_tokens(self, tokens: int) -> int:
        """How many tokens are computed for `tokens` packed ones, padding included."""
        return padded_count(tokens, few_counts=self.products != torch.float32) if self.options.pad else tokens

    @property
    def frozen_prefix(self) -> FrozenPrefix | None:
        """The cached hidden states of the lowest blocks, while the model has some (models/text/cached_states)."""
        path, count = self._blocks
        block = modules.find(self.model, f"{path}.0") if count else None
        return block.prefix if isinstance(block, PrefixBlock) else None

    def _from_cached_states(self, batch: Batch, layout: PrefixLayout) -> AbstractContextManager[None]:
        """A context in which the lowest blocks return cached states, where all rows of the batch have some."""
        prefix = self.frozen_prefix if self.options.use_cached else None
        ids = batch.ids if batch.numbers is None else torch.from_numpy(batch.numbers[0])
        states = None if prefix is None else prefix.states_of(ids, batch.lengths, layout.prefix)
        if prefix is None or states is None:
            return nullcontext()
        padded = to_device(nn.functional.pad(states, (0, 0, 0, len(layout.ids) - len(states))), self.device)
        return prefix.returning(padded[None])

    def _known_on_host(self, layout: PrefixLayout) -> AbstractContextManager[None]:
        """A context in which a streamed embedding looks tokens up without asking the device for their ids."""
        return nullcontext() if self.streamed is None else self.streamed.looking_up(torch.from_numpy(layout.numbers)[None])

    def layout(self, batch: Batch) -> PrefixLayout:
        """The packed batch as the model gets it. Rows whose rotary frequencies differ, or that exceed a chunk of the attention,
        share no prefix."""
        apart = lengths_differ(self.switch_length, batch.lengths) or self._exceeds_chunk(batch.lengths)
        share = self.options.share_prefix and not apart
        return (shared_layout if share else unshared_layout)(batch, self.computed_tokens)

    @property
    def switch_length(self) -> int | None:
        """The most tokens of a row with the rotary frequencies of short rows; None where all rows have the same ones."""
        return self._rotaries[0].switch if self._rotaries else None

    def _apart(self, lengths: Sequence[int]) -> list[int]:
        """How many consecutive rows are computed together: of padded rows, one that is longer than `chooses_beyond` alone."""
        most = self.chooses_beyond if self.pads and self.options.rows_apart else None
        if most is None or max(lengths) <= most or len(lengths) == 1:
            return [len(lengths)]
        if self.streamed is not None and not self.streamed.running:
            raise NotStreamed(f"It chooses among the tokens of rows of more than {most:,} tokens, which are in one batch here.")
        runs = groupby(enumerate(lengths), key=lambda row: row[0] if row[1] > most else -1)
        return [len(list(run)) for _, run in runs]

    @cached_property
    def chooses_beyond(self) -> int | None:
        """The most tokens of a row that all attend to each earlier one; None for any number (models/attention)."""
        return chooses_beyond(self.model)

    def _exceeds_chunk(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths in tokens are cut into chunks by some layers, which share no prefix."""
        size = getattr(self.model.config.get_text_config(), "attention_chunk_size", None)
        return size is not None and max(lengths, default=0) > size

    @cached_property
    def _rotaries(self) -> list[RowRotary]:
        return [module for module in self.model.modules() if isinstance(module, RowRotary)]

    def _by_length(self, batch: Batch, layout: PrefixLayout | None = None) -> AbstractContextManager[None]:
        """A context in which each row of the batch has its own rotary frequencies; it is packed as in `layout`, else padded."""
        switch = self.switch_length
        if switch is None or not lengths_differ(switch, batch.lengths):
            return nullcontext()
        long = np.array(batch.lengths) > switch
        if layout is None:
            return separated(self._rotaries, to_device(torch.from_numpy(long[:, None]), self.device))
        of_tokens = np.repeat(long, batch.lengths)
        padded = np.pad(of_tokens, (0, len(layout.ids) - len(of_tokens)))
        return separated(self._rotaries, to_device(torch.from_numpy(padded[None]), self.device))

    def micro_batches(self, rows: Sequence[Example], max_tokens: int) -> list[Batch]:
        """Cuts the rows of a step into batches of at most `max_tokens` computed tokens; a longer row is a batch of its own.

        A prefix that all rows of a batch share counts once. Only Lorakeet's own attention does not copy it for each row; with
        another, `max_tokens` also bounds the tokens of the rows in all, and of their padding. Rows with other rotary frequencies
        are in other batches. Rows go alone whose temperatures depend on their place in a batch, or whose tokens are chosen among.
        """
        if (start := temperature_start(self.model.config)) is not None:
            max_tokens = min(max_tokens, start)
        if (switch := self.switch_length) is not None and rows and lengths_differ(switch, [len(row.ids) for row in rows]):
            kinds = [row for row in rows if len(row.ids) <= switch], [row for row in rows if len(row.ids) > switch]
            return [batch for kind in kinds for batch in self.micro_batches(kind, max_tokens)]
        if self.pads and self.options.rows_apart and (most := self.chooses_beyond) is not None:
            long = [row for row in rows if len(row.ids) > most]
            rows = [row for row in rows if len(row.ids) <= most]
            return [*map(pack_examples, zip(long)), *micro_batches(rows, max_tokens, padded=True)]
        if not self.options.share_prefix or self.pads or self._exceeds_chunk([len(row.ids) for row in rows]):
            return micro_batches(rows, max_tokens, padded=self.pads)
        return prefix_batches(rows, self.batch_limits([len(row.ids) for row in rows], max_tokens))

    def batch_limits(self, lengths: Sequence[int], max_tokens: int) -> BatchLimits:
        """The limits of batches of `max_tokens` computed tokens, from rows of these lengths in tokens, that share prefixes."""
        times = TIMES if self._copies_nothing(lengths) else 1
        a_pass = READ if self.sharded or self.streamed is not None else PASS
        return BatchLimits(max_tokens, times, a_pass)

    def _copies_nothing(self, lengths: Sequence[int]) -> bool:
        """True if Lorakeet's own kernel attends to rows of these lengths (kernels/cpu/attention.RowAttention)."""
        attention = next((part for part in self._last_parts() if isinstance(part, RotaryAttention)), None)
        if attention is None or min(lengths, default=0) < TILED or attention.exceeds_window(max(lengths)):
            return False
        return attends_in_c(self.dtype, self.products, cast(Any, attention.original).head_dim, self.device)

    @contextmanager
    def narrowing_last_block(self, layout: PrefixLayout) -> Iterator[None]:
        """A context in which the fused parts of the last block compute only tokens that predict a target, where these are few.

        The blocks before it need every token, for the keys and values of later ones.
        """
        few = self.options.narrow_last_block and 2 * len(layout.target_positions) < layout.tokens
        parts = self._last_parts() if few else []
        for part in parts:
            part.only = layout.read
        try:
            yield
        finally:
            for part in parts:
                part.only = None

    @cached_property
    def _blocks(self) -> tuple[str, int]:
        return modules.block_prefix(self.model, self.family)

    @cached_property
    def _last_block(self) -> str:
        """The path of the block that computes last; empty if there is none."""
        prefix, count = self._blocks
        return f"{prefix}.{count - 1}" if modules.blocks_run_once(self.model, self.family) else ""

    def _last_parts(self) -> list[GatedMlp | RotaryAttention]:
        """The fused parts of the block that computes last; none where blocks run several times, or in another order."""
        last = modules.find(self.model, self._last_block) if self._last_block else None
        return [] if last is None else list(_single_parts(last))

    def head(self, hidden: Tensor) -> Tensor:
        """Returns the logits (n, vocabulary) of `hidden` (n, hidden), with the family's factor, divisor and soft cap.

        They keep the dtype of the products where the weights have another: rounded to bf16, close answers would tie.
        """
        weight, layer = self._plain_head_weight, self.model.get_output_embeddings()
        if isinstance(layer, (PackedLinear, ReorderedLinear)):
            logits = cast(Tensor, layer(hidden.to(self.products)))
        elif weight is not None:
            logits = tiled_product(hidden.to(self.products), weight)
        else:
            logits = cast(Tensor, layer(hidden))
        scaling = self._logit_scaling
        if scaling.factor != 1:
            logits = logits * scaling.factor
        if scaling.divisor != 1:
            logits = logits / scaling.divisor
        return logits if scaling.cap is None else torch.tanh(logits / scaling.cap) * scaling.cap

    @property
    def head_weight(self) -> RowSource | None:
        """The frozen (vocabulary, hidden) weight W if logits are exactly hidden·Wᵀ, without bias, cap or adapter; else None."""
        return self._plain_head_weight if self._logit_scaling.none else None

    @cached_property
    def _logit_scaling(self) -> LogitScaling:
        return self.family.logits_of(self.model.config.get_text_config())

    @property
    def _plain_head_weight(self) -> RowSource | None:
        """The frozen weight of a head that is an nn.Linear without bias or active adapter; else None."""
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
        """The store of a streamed model's frozen weights; None of a model in memory."""
        return None if self.streamed is None else self.streamed.stream.store

    def release(self) -> None:
        """Frees the memory of a streamed model's blocks; they are read again when it computes."""
        if self.streamed is not None:
            self.streamed.stream.release()

    def add_tokens(self, tokens: tuple[str, ...]) -> tuple[int, ...]:
        """Adds `tokens` to the tokenizer and returns their ids, for `inject(…, token_ids=…)`; known tokens keep their id."""
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        return tuple(int(number) for number in self.tokenizer.convert_tokens_to_ids(list(tokens)))

    @property
    def _pad(self) -> int:
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return 0 if pad is None or pad < 0 else int(pad)

    def _decode(self, ids: Tensor, **arguments: Any) -> Tensor:
        """Returns the decoder's last hidden states (rows, tokens, hidden) of `ids` (rows, tokens)."""
        masks: Any = masks_by_kind(self.model.config, ids, self.dtype) if self.masks_by_kind else torch.ones_like(ids)
        output = modules.decoder_of(self.model)(input_ids=ids, attention_mask=masks, use_cache=False, **arguments)
        if not hasattr(output, "last_hidden_state"):
            raise EnvironmentProblem(
                f"'{self.model.config.model_type}' models cannot be used: what transformers calls their decoder gives no hidden "
                f"states ({type(output).__name__})."
            )
        return cast(Tensor, output.last_hidden_state)


def _single_parts(module: nn.Module) -> Iterator[GatedMlp | RotaryAttention]:
    """Yields the fused parts of a block outside of lists. One in a list may get some tokens only (experts), or feed a later one
    (two attentions in a block)."""
    for child in module.children():
        if isinstance(child, (GatedMlp, RotaryAttention)):
            yield child
        elif not isinstance(child, nn.ModuleList):
            yield from _single_parts(child)


def token_logprobs(text: TextModel, batch: Batch, *, chunk: int = 256) -> Tensor:
    """Returns log p of each target (targets,), fp32, without gradient; the head runs on `chunk` targets at a time."""
    found = []
    targets, weight = batch.target_ids.to(text.device), text.head_weight
    if is_read_in_tiles(weight, text.device):
        with torch.no_grad():
            states = text.hidden(batch).to(text.products)
            return -tiled_losses(states, weight, targets, chunk=chunk, wants_grad=False)[0]
    for start, logits in zip(range(0, batch.targets, chunk), target_logits(text, batch, chunk=chunk), strict=True):
        exact = logits.float()
        chosen = exact.gather(1, targets[start : start + chunk, None])
        top = exact.amax(1, keepdim=True)
        norm = exact.sub_(top).exp_().sum(1, keepdim=True)  # in place: torch's logsumexp makes another (chunk, vocabulary)
        found.append((chosen - top - norm.log()).squeeze(1))
    return torch.cat(found) if found else torch.empty(0, device=text.device)


def target_logits(text: TextModel, batch: Batch, *, chunk: int = 256) -> Iterator[Tensor]:
    """Yields the logits (chunk, vocabulary) at the targets, in the model's dtype and without gradient."""
    if not batch.targets:
        return
    with torch.no_grad():
        hidden = text.hidden(batch)
    for part in hidden.split(chunk):  # type: ignore[no-untyped-call]
        with torch.no_grad():
            logits = text.head(part)
        yield logits
