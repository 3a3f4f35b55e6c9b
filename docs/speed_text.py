"""What docs/explain/speed.md says besides what was measured; `docs/draw_speed.py` puts the two together."""

from __future__ import annotations

# SmolLM2-135M: 30 blocks of q, o (576 x 576), k, v (576 x 192), gate, up, down (576 x 1,536); a head of 49,152 x 576.
BLOCK_WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
HEAD_WEIGHTS = 49152 * 576
PAIR_PARAMETERS = 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))  # rank 8

HEAD = """
# How fast training is, and why

This page is made from `benchmarks/results` by `make docs`; a test compares the two. Contenders are measured on one machine,
in alternated rounds of fresh processes, on the same rows in the same order, with the same rank, alpha, targets, learning rate
and batch size, from the same A and B, but where a row says that it trains otherwise. Losses are compared step by step:
learning something else faster does not count. Nothing on this page ran on a GPU.
"""

WHY = f"""
## Why: the floor

A frozen weight W (out, in) costs each token 2·out·in FLOPs on the way forward (y = W·x) and as many on the way back (∂L/∂x =
Wᵀ·∂L/∂y). Full fine-tuning pays as much again for ∂L/∂W; LoRA never does. So **4 FLOPs a frozen weight and token** are the
floor of any LoRA training whose gradients pass through the whole model. SmolLM2-135M has {BLOCK_WEIGHTS:,} weights in the
matrices of its blocks: {4 * BLOCK_WEIGHTS / 1e6:.0f} MFLOP a token. The pairs of rank 8 add 6 a parameter (forward, ∂A and
∂B, ∂x), that is {6 * PAIR_PARAMETERS / 1e6:.0f} MFLOP. Attention in a row of t tokens adds 2·t for each block and channel on
the way forward, where a causal mask lets half of the scores through, and two and a half times that on the way back.

What is left out here, and costs others time:

- **The head where nothing is learnt.** With 49,152 words the head has {HEAD_WEIGHTS / 1e6:.0f} million weights,
{100 * HEAD_WEIGHTS / BLOCK_WEIGHTS:.0f} % on top of the blocks. A classification row learns its answer alone; the head, and
of the last block what follows its attention, are computed for the learnt tokens alone (`train/text/loss`). A trainer that
makes logits of all tokens pays for all of them, in memory too.
- **Padding.** Rows are laid end to end (`data/pack`), and attention stays within a row. A batch that is padded to its longest
row computes its filler, the more of it the more the lengths of its rows differ.
- **Computing forwards twice.** TRL and unsloth checkpoint gradients by default: 6 FLOPs a weight in place of 4. Here little
is saved, since a step is cut into micro-batches of `train.micro_tokens`.
- **Passes over memory.** q, k and v with their pairs, rotary positions and attention are one autograd function; so are the
gated MLP with its three pairs, and RMSNorm (`core/fused/attention`, `core/fused/mlp_and_norm`). What lies between their products
is made again or overwritten. Each carries the derivation of its backward pass.
- **Several passes where one would do.** On Linux with AVX512_BF16 and a gcc, attention over rows and the passes between products
(RMSNorm, the gate, rotary positions) are C, and so are the products of all pairs, which would be hundreds of small ones where
several adapters share a step. They are compiled when they are first used (`kernels/cpu`; `lorakeet doctor` says whether they
are): scores stay in the cache, and masked tiles are left out. Without it torch's own operations compute the same to rounding.
- **A weight laid out slowly.** Before each product the library lays a weight out as the processor's registers take it. Where
C serves, frozen weights are multiplied by a kernel of Lorakeet's own, which does so for all tokens at once, with the rows to
come fetched ahead, and keeps nothing for the number of tokens. Each thread lays out what it multiplies, in a cache of its own,
and waits for no other until the end. With AMX they are left to oneDNN, which has tiles for it; that was not measured.
- **Asking.** A step of a small model is thousands of operations, and Python needs ten times as long to ask for one as in a loop
by itself, since what it needs has left the processor's caches between two products. Where C serves, a whole decoder block is
one call each way (`core/fused/trained_block`), with the bits of its parts; what that call is told is kept, and used again where
a look at the block finds everything as it was (`core/fused/trained_block_cache`).
- **What pairs add in a pass of its own.** It is added to a product with a frozen weight while that is in registers, rounded as if
it had been in memory.
- **Packed weights brought back.** NF4, GPTQ of 4 bits, int8 and GGUF's blocks are laid out for a product as they are, some
columns of the result at a time (`kernels/cpu/unpack_panels.c`): no weight stands in bf16 as a whole, and GPTQ's words, which hold
neighbours of a sum, need not be turned over. A step over NF4 was a quarter slower than over dense weights, and now takes about
the same ([log](../log/training-speed.md)).
- **The slower dtype.** Whether products are faster in bf16 or in fp32 is measured when the model is loaded
(`core/precision`): a processor may have instructions for bf16 and yet be slower with them.
- **What rows begin with.** Tokens that all rows of a micro-batch begin with, from a template, a system prompt or examples, are
computed once for all of them, with exact gradients (`data/prefix`). A step's rows are put together so that as much as can be is
computed once, and what is computed once counts once among `train.micro_tokens` (`data/prefix`): behind a prompt of 1,500
tokens
five rows of 100 pass together, not one by one. Rows with different prompts pass apart where that saves more than a pass costs.
This needs no setting; dropout turns it off. Where another attention than Lorakeet's own computes (on a card, in fp32), only who
passes with whom is chosen: a batch has no more tokens in all than it may compute.
- **Blocks below the lowest adapter.** With `lora.layers: top:8` no gradient goes below the eighth block from the top, and
with `train.keep_prefix_states` what the blocks below make of a row is computed once for all epochs. Fewer matrices are
adapted, so this trains another model, whose quality has to be measured: it is not the default.

## Why not at the floor, least of all with short rows

A product reaches the machine's rate with many tokens at once. Rows of 128 tokens share one product with every frozen weight,
but their attention is many small products. Norms, rotary positions, SwiGLU, softmax, casts and the optimizer read and write
memory and compute next to nothing; none of them is among the FLOPs of the floor. [The log](../log/training-speed.md)
says what a step was seen
to be made of, and what was tried and not kept.
"""

TAIL = """
## Measure it yourself

```sh
python benchmarks/finetune_vs_peft.py --shuffled --steps 8 --unsloth-python PATH
python benchmarks/finetune_vs_peft.py --to-loss --shuffled --steps 16 --rounds 3 --unsloth-python PATH
python benchmarks/roofline.py --whole
python benchmarks/shared_beginning.py
python benchmarks/roofline.py --model meta-llama/Llama-3.2-1B --lengths 512 2048 --bases dense nf4
python benchmarks/int8_products.py
python benchmarks/growth.py
python benchmarks/frozen_prefix.py
make docs
```

[benchmarks/README.md](../../benchmarks/README.md) says how long each takes and what the contenders are. Each result notes how
busy the machine was before its first run; only on an idle one do its times mean anything.
"""
