"""Text generation: greedy or sampled, seeded row by row."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from lorakeet.core.initialise import seed_for
from lorakeet.data.chat import Example
from lorakeet.data.prefix import PASS
from lorakeet.memory.spill import Spill
from lorakeet.models.attention import temperature_start
from lorakeet.models.families import READS_PADDING
from lorakeet.models.inject import activate
from lorakeet.models.modules import decoder_of
from lorakeet.models.text.load import ATTENTION_TOLERANCE, set_attention
from lorakeet.models.text.model import TextModel

Ids = NDArray[np.int64]
# transformers 5.24 renamed it; the last release for Python 3.10 is 5.20.
CACHE = "cache" if "cache" in {part.name for part in fields(BaseModelOutputWithPast)} else "past_key_values"
STREAMED_CACHE = 128 << 20  # bytes of a KV cache beside a streamed model: less than the optimizer state of training
LEFT_OUT = 0.75  # of the rows of a batch that are still written, from which on the others are left out
ROWS_AT_ONCE = 64  # a step takes about as long for 64 rows as for 16: the weights are read once


def sample(
    text: TextModel,
    prompts: Sequence[Ids | Sequence[int]],
    *,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    done: Callable[[list[int]], bool] | None = None,
    blocks: int | None = None,
    spill: Callable[[], Spill] | None = None,
) -> list[Ids]:
    """Returns the model's continuation of each prompt: at most `max_tokens` ids, an end-of-text id included.

    A row also ends where `done` is true of its ids. Tokens that the prompts of a batch begin with are computed once, and rows
    that have ended are left out.

    Temperature 0 takes the likeliest token. Row i has its own generator, seeded by `seed` and i, so that its draws do not depend
    on other rows. Uses the active adapter, or the base without one. The KV cache of a streamed model, if one row exceeds
    STREAMED_CACHE, is in `spill` (default: a file beside its store); `blocks` as in `rows_at_once`. Raises ValueError for an
    empty prompt or a negative temperature.
    """
    if temperature < 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"sample() needs a temperature of 0 or more (not {temperature}) and prompts of at least one token")
    generators = [torch.Generator().manual_seed(seed_for(seed, f"sample/{row}")) for row in range(len(prompts))]

    def draw(logits: Tensor, rows: Sequence[int]) -> list[int]:
        return _draw(logits, temperature, [generators[row] for row in rows])

    return _written(text, prompts, max_tokens, draw, done=done, blocks=blocks, spill=spill)


def sample_by(
    text: TextModel, prompts: Sequence[Ids | Sequence[int]], choose: Sequence[Callable[[Tensor], int]], *, max_tokens: int
) -> list[Ids]:
    """As `sample`, but each prompt's tokens are chosen by its own function of the logits (vocabulary,), in fp32 on the CPU."""

    def draw(logits: Tensor, rows: Sequence[int]) -> list[int]:
        return [choose[row](found) for row, found in zip(rows, logits, strict=True)]

    return _written(text, prompts, max_tokens, draw)


Draw: TypeAlias = Callable[[Tensor, Sequence[int]], list[int]]  # logits (rows, vocabulary) and the prompts' numbers → tokens


def _written(
    text: TextModel, prompts: Sequence[Ids | Sequence[int]], max_tokens: int, draw: Draw, *,
    done: Callable[[list[int]], bool] | None = None, blocks: int | None = None, spill: Callable[[], Spill] | None = None,
) -> list[Ids]:  # fmt: skip
    """The continuations of all prompts, those of about one length together."""
    ends = end_ids(text)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    written: list[list[int]] = [[] for _ in prompts]
    was_training = text.model.training
    text.model.eval()
    try:
        packed = text.attention == "varlen"
        with torch.no_grad(), _cached_attention(text):
            length = max((len(prompt) for prompt in prompts), default=1) + max_tokens
            at_once = rows_at_once(text, length, blocks=blocks)
            for rows, anew in _batches(text, order, [len(prompt) for prompt in prompts], max_tokens, at_once):
                chosen = [np.asarray(prompts[row], np.int64) for row in rows]
                drawing = Drawing(ends, draw, rows, done)
                with nullcontext() if anew else _cache_of(text, length, blocks, spill) as cache:
                    drawn = _write(text, chosen, max_tokens, drawing, Caching(cache, packed, anew))
                for row, ids in zip(rows, drawn, strict=True):
                    written[row] = ids
    finally:
        text.model.train(was_training)
    return [np.asarray(ids, np.int64) for ids in written]


def _batches(
    text: TextModel, order: Sequence[int], lengths: Sequence[int], max_tokens: int, at_once: int
) -> Iterator[tuple[Sequence[int], bool]]:
    """Yields the prompts that are continued together, and whether their texts are computed anew for each token.

    They are where a model's code takes no cache, and where the rotary frequencies change on the way, which changes cached keys.
    Prompts with other frequencies are in other batches.
    """
    anew = not _takes_cache(text)
    start = temperature_start(text.model.config)
    longest, chosen = max(lengths, default=0) + max_tokens, text.chooses_beyond
    apart = any(most is not None and longest > most for most in (start, chosen))  # padding moves a text's tokens, or is chosen
    if anew or apart or _reads_padding(text):
        yield from (([row], anew) for row in order)
        return
    switch = text.switch_length
    kinds = [0 if switch is None or lengths[row] + max_tokens <= switch else 2 if lengths[row] > switch else 1 for row in order]
    for kind in sorted(set(kinds)):
        rows, count = [row for row, own in zip(order, kinds, strict=True) if own == kind], 1 if kind == 1 else at_once
        yield from ((rows[start : start + count], kind == 1) for start in range(0, len(rows), count))


def _reads_padding(text: TextModel) -> bool:
    """Whether a text's own tokens depend on how many tokens of padding stand before them, of whatever length it is."""
    return str(getattr(text.model.config, "model_type", "")) in READS_PADDING or _counts_padding(text)


def _counts_padding(text: TextModel) -> bool:
    """Whether code that takes no positions counts padding among them, as BART's does; measured on two tokens."""
    if "position_ids" in _parameters(text):
        return False
    alone, padded = (torch.tensor([ids], device=text.device) for ids in ([1, 2], [0, 0, 0, 1, 2]))
    states = _decoded(text, alone, None, None), _decoded(text, padded, (padded != 0).long(), None)
    wanted, found = (each.float() for each in states)
    return bool((found - wanted).abs().max() > ATTENTION_TOLERANCE[text.dtype] * wanted.abs().max())


def rows_at_once(text: TextModel, length: int, *, blocks: int | None = None) -> int:
    """Returns how many rows of `length` tokens are generated together: fewer for a streamed model, so that their KV cache fits.

    `blocks` is the number of blocks of the real model, if `text` has only a few of them (planning/rehearse_text).
    """
    if text.streamed is None:
        return ROWS_AT_ONCE
    return max(1, min(ROWS_AT_ONCE, STREAMED_CACHE // _row_bytes(text, length, blocks or len(text.streamed.blocks))))


@contextmanager
def _cache_of(text: TextModel, length: int, blocks: int | None, spill: Callable[[], Spill] | None) -> Iterator[Any]:
    """A context with a KV cache on disk if one row is too large for memory; else None, and transformers makes its own."""
    store = text.store
    if store is None or text.streamed is None or text.device.type != "cpu":
        yield None
        return
    if _row_bytes(text, length, blocks or len(text.streamed.blocks)) <= STREAMED_CACHE:
        yield None
        return
    with closing(Spill(store.path.parent) if spill is None else spill()) as scratch:
        yield spilled_cache(text.model.config, scratch)


def _row_bytes(text: TextModel, length: int, blocks: int) -> int:
    """Returns the KV cache bytes of a row of `length` tokens in `blocks` blocks."""
    return cache_bytes(text.model.config.get_text_config(), length, blocks, text.dtype.itemsize)


def spilled_bytes(config: Any, length: int, blocks: int) -> int:
    """Returns the KV cache bytes on disk of a row of `length` tokens, for a streamed model in fp32 with this text config; 0 if
    they fit into STREAMED_CACHE."""
    size = cache_bytes(config, length, blocks, torch.float32.itemsize)
    return size if size > STREAMED_CACHE else 0


def cache_bytes(config: Any, length: int, blocks: int, itemsize: int) -> int:
    """Returns the KV cache bytes of a row of `length` tokens in `blocks` blocks of a model with this text config."""
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * length * kv_heads * width * itemsize * blocks


def end_ids(text: TextModel) -> frozenset[int]:
    """Returns the ids that end a text: the tokenizer's and the generation settings'."""
    settings = getattr(text.model, "generation_config", None)
    ends: list[int] = []
    for end in (getattr(settings, "eos_token_id", None), getattr(text.tokenizer, "eos_token_id", None)):
        ends += list(end) if isinstance(end, (list, tuple)) else [] if end is None else [end]
    return frozenset(ends)


@dataclass
class Drawing:
    """How the tokens of a batch are chosen, and when a row has ended."""

    ends: frozenset[int]
    draw: Draw
    prompts: Sequence[int]  # their numbers, one for each row of the batch
    done: Callable[[list[int]], bool] | None = None

    def ended(self, written: list[int]) -> bool:
        """True if the row's last token, or what was written, ends it."""
        return written[-1] in self.ends or (self.done is not None and self.done(written))


@dataclass
class Caching:
    """The KV cache of a batch: None for transformers' own, and none where its texts are computed `anew` for each token.

    packed: whether attention is packed otherwise. Then only positions count, so that padding may follow the shared tokens.
    """

    cache: Any
    packed: bool
    anew: bool


def _write(text: TextModel, prompts: list[Ids], max_tokens: int, drawing: Drawing, caching: Caching) -> list[list[int]]:
    """Generates one batch, its own tokens padded on the left behind what all prompts begin with.

        shared  shared  …  –  own  own        once for all rows │ a row each
        shared  shared  … own own  own
    """
    cache, written = caching.cache, [list[int]() for _ in prompts]
    shared, cached = 0, not caching.anew
    if cache is None and cached:
        cache = _new_cache(text)
        shared = _shared(prompts) if caching.packed and _selectable(cache, (DynamicLayer,)) else 0
    if shared:
        _decoded(text, torch.as_tensor(prompts[0][:shared], device=text.device)[None], None, cache)
        cache.batch_repeat_interleave(len(prompts))
    ids, mask = (torch.as_tensor(laid).to(text.device) for laid in _laid_out(prompts, shared))
    rows, droppable = list(range(len(prompts))), cached and _selectable(cache, (DynamicLayer, DynamicSlidingWindowLayer))
    open_rows = set(rows)
    for _ in range(max_tokens):
        logits = text.head(_decoded(text, ids, mask, cache)).float().cpu()
        chosen = drawing.draw(logits, [drawing.prompts[row] for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            if row in open_rows:
                written[row].append(token)
                if drawing.ended(written[row]):
                    open_rows.discard(row)
        if not open_rows:
            break
        new = torch.tensor(chosen, device=text.device)[:, None]
        ids = new if cached else torch.cat([ids, new], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if droppable and len(open_rows) <= LEFT_OUT * len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in open_rows], device=text.device)
            cache.batch_select_indices(kept)
            ids, mask, rows = ids[kept], mask[kept], [row for row in rows if row in open_rows]
    return written


def _laid_out(prompts: Sequence[Ids], shared: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (rows, longest - shared) behind the `shared` tokens, padded on the left, and which of all (rows, longest) are no
    padding, as 0 and 1.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids, seen = np.zeros((len(prompts), longest), np.int64), np.ones((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        padding = longest - len(prompt)
        ids[row, shared + padding :] = prompt[shared:]
        seen[row, shared : shared + padding] = 0
    return ids[:, shared:], seen


def _decoded(text: TextModel, ids: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """The hidden state after the last of `ids` (rows, tokens), which follow those in `cache`: (rows, hidden)."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    cached = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
    output = decoder_of(text.model)(input_ids=ids, attention_mask=mask, position_ids=positions, **cached)
    states: Tensor = output.last_hidden_state[:, -1]
    return states


def _shared(prompts: Sequence[Ids]) -> int:
    """Tokens that all prompts begin with, less than the shortest has; 0 if that saves less than a pass costs."""
    most = min(len(prompt) for prompt in prompts) - 1
    beginnings = np.stack([prompt[:most] for prompt in prompts])
    common = int((beginnings == beginnings[0]).all(0).cumprod().sum())
    return common if common * (len(prompts) - 1) >= PASS else 0


def _takes_cache(text: TextModel) -> bool:
    """Whether the model's own code takes transformers' cache. RWKV and the first GPT do not: the whole text is computed anew."""
    return CACHE in _parameters(text)


def _parameters(text: TextModel) -> Collection[str]:
    """The names that the forward pass of the model's own decoder takes."""
    return inspect.signature(type(decoder_of(text.model)).forward).parameters


def _new_cache(text: TextModel) -> DynamicCache:
    """An empty KV cache of transformers; of the class that the model's own code has for it, as MiniMax's."""
    code = sys.modules[type(decoder_of(text.model)).__module__]
    known = [kind for kind in vars(code).values() if isinstance(kind, type) and issubclass(kind, DynamicCache)]
    own = [kind for kind in known if kind is not DynamicCache]
    if own:
        return own[0]()
    config = text.model.config
    counted = config.attribute_map.get("num_hidden_layers") != "encoder_layers"  # of another part, in BART's relatives
    return DynamicCache(config=config) if counted else DynamicCache()


def _selectable(cache: DynamicCache, kinds: tuple[type, ...]) -> bool:
    """Whether all layers of a cache are of `kinds`, whose rows can be repeated and left out."""
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def _draw(logits: Tensor, temperature: float, generators: list[torch.Generator]) -> list[int]:
    """Returns one id for each row of logits (rows, vocabulary): the first whose cumulated probability exceeds a random number."""
    if temperature == 0:
        return [int(number) for number in logits.argmax(-1)]
    cumulated = (logits / temperature).softmax(-1).double().cumsum(-1)
    uniform = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    found = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    return [int(number) for number in found.clamp_max(logits.shape[1] - 1)]


@contextmanager
def _cached_attention(text: TextModel) -> Iterator[None]:
    """A context with sdpa (or eager) in place of packed attention, which has no KV cache."""
    usual = text.attention
    if usual == "varlen":
        try:
            set_attention(text.model, "sdpa" if text.model._supports_sdpa else "eager")
        except ValueError:  # of transformers: a part beside the text, such as a tower for sound, has no sdpa
            set_attention(text.model, "eager")
    try:
        yield
    finally:
        if usual == "varlen":
            set_attention(text.model, "varlen")


def spilled_cache(config: Any, spill: Spill) -> DynamicCache:
    """Returns transformers' cache for a model of `config`, whose layers without a window spill to `spill`.

        block i computes its new keys and values ──► appended to the file ──► all of block i read, attended to, freed

    Each token reads all of them once, beside the blocks of a streamed model, which are far larger.
    """
    cache = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = _SpilledLayer(spill, number)
    return cache


class _SpilledLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (rows, heads, tokens, width) of one block, appended piece by piece."""

    def __init__(self, spill: Spill, number: int) -> None:
        super().__init__()
        self._spill, self._number = spill, number
        self._pieces = self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends new keys and values and returns all."""
        self._length += key_states.shape[-2]
        return self._appended("keys", key_states), self._appended("values", value_states, last=True)

    def get_seq_length(self) -> int:
        return self._length

    def _appended(self, what: str, states: Tensor, *, last: bool = False) -> Tensor:
        whole = torch.cat([*(self._spill.get((self._number, what, piece)) for piece in range(self._pieces)), states], dim=-2)
        self._spill.put((self._number, what, self._pieces), states.contiguous())
        self._pieces += last
        return whole


def sampled_texts(text: TextModel, count: int, tokens: int, *, seed: int) -> list[Example]:
    """Texts that the base samples from its BOS token at temperature 1; every token but the first is a target."""
    activate(text.model, None)
    start = next((t for t in (text.tokenizer.bos_token_id, text.tokenizer.eos_token_id) if t is not None), 0)
    written = sample(text, [[int(start)]] * count, max_tokens=tokens, seed=seed_for(seed, "drift") % 2**31, temperature=1.0)
    texts = [np.array([int(start), *ids], np.int64) for ids in written]
    return [
        Example(ids, np.arange(len(ids)) > 0, f"sample-{number}", None, False)
        for number, ids in enumerate(texts) if len(ids) > 1
    ]  # fmt: skip
