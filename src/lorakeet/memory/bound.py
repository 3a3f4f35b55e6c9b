"""How much memory a streamed training step takes at most, from a model's shapes: sums that a reader can check.

Counted are the tensors of the step in train/loop and core/fused. `WORK` is what one block's forward and backward pass hold
beside its input, in bytes for each token:

    in the MLP         x·(9·d + 2·f) + p·(4·f + 2·d)      x: bytes of a state, p: of a product, d: hidden, f: inner width
    in the attention   x·9·d + 4·9·d                      its CPU kernel works in fp32
                       x·9·d + 10·heads·256               or in blocks of 256 queries

Measured on one block of Llama-2 7B with 2,048 tokens: 450 MB, against 454 MB by this sum; a tenth is added.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 1.1
RUNTIME = 96 << 20  # bytes that the process still grows by once every kernel has run
TILE_ROWS = 8192  # of the head (core/tiles)
QUERIES = 256  # of the attention (core/row_attention)


@dataclass(frozen=True)
class Shapes:
    """A model in numbers; sizes in bytes, widths in numbers."""

    blocks: int
    block_bytes: int  # of the largest block, as stored
    block_total: int  # of all blocks
    end_bytes: int  # of embedding and head, which are read row by row when streamed
    rest_bytes: int  # of what always stays: norms, biases, heads with more than a weight
    largest: int  # numbers in the largest packed matrix, which is unpacked for each product; 0 where none is packed
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    state: int  # bytes of a number in a hidden state
    product: int  # of a number in a matrix product


@dataclass(frozen=True)
class Step:
    """What one optimizer step works on."""

    trained: int  # parameters, in fp32
    tokens: int  # of the largest micro-batch
    batches: int  # micro-batches of a step
    head_chunk: int

    @property
    def kept_bytes(self) -> int:
        """Parameters and moments; the best parameters so far are on disk (train/best)."""
        return 12 * self.trained


def work(model: Shapes, step: Step) -> int:
    """Bytes that one micro-batch takes in one block or in the head, whichever is more."""
    d, f, x, p = model.hidden, model.inner, model.state, model.product
    mlp = x * (9 * d + 2 * f) + p * (4 * f + 2 * d)
    attention = x * 9 * d + max(36 * d, 10 * model.heads * QUERIES)
    tile = min(TILE_ROWS, model.vocabulary) * d * (x + p)
    head = step.head_chunk * model.vocabulary * (4 + 4 + x) + tile + step.tokens * d * (4 * x + 4)
    return int(MARGIN * max(step.tokens * max(mlp, attention), head)) + model.largest * p


def streamed(model: Shapes, step: Step, runtime: int, *, together: int, aside: bool) -> int:
    """The peak of a step with two blocks in memory and `together` micro-batches on their way; `aside`: block inputs on disk.

    A trained parameter takes 4 bytes, its moments 8. Its gradient's 4 come as the block inputs go.
    """
    states = together * step.tokens * model.hidden * model.state
    inputs = 0 if aside else model.blocks * states
    passing = max(inputs, 4 * step.trained) + 2 * states
    return runtime + RUNTIME + model.rest_bytes + step.kept_bytes + 2 * model.block_bytes + passing + work(model, step)


@dataclass(frozen=True)
class Choice:
    """How a run is streamed, and the bytes that it is planned to take."""

    planned: int
    together: int  # micro-batches that pass through a block while it is in
    aside: bool  # whether block inputs are kept on disk


def choose(model: Shapes, step: Step, runtime: int, budget: int) -> Choice | None:
    """The fastest way to stream within `budget`; None where there is none.

    As many micro-batches as possible at once, with their block inputs in memory if there is room.
    """
    for together in range(step.batches, 0, -1):
        for aside in (False, True):
            planned = streamed(model, step, runtime, together=together, aside=aside)
            if planned <= budget:
                return Choice(planned, together, aside)
    return None


def least(model: Shapes, step: Step, runtime: int) -> int:
    """The smallest budget that streaming keeps."""
    return streamed(model, step, runtime, together=1, aside=True)
