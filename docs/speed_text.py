"""What docs/explain/speed.md says besides what was measured; `docs/draw_speed.py` puts the two together."""

from __future__ import annotations

# SmolLM2-135M: 30 blocks of q, o (576 x 576), k, v (576 x 192), gate, up, down (576 x 1,536); a head of 49,152 x 576.
BLOCK_WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
HEAD_WEIGHTS = 49152 * 576
PAIR_PARAMETERS = 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))  # rank 8

HEAD = """
# How fast training is, and why

Every number on this page comes from `benchmarks/results`; `make docs` writes the page, and a test compares the two. Nothing ran
on a GPU.

Contenders run on one machine, in alternated rounds of fresh processes. They train on the same rows in the same order, with the
same rank, alpha, targets, learning rate and batch size, from the same A and B. A table names those that train otherwise. Losses
are compared step by step: learning something else faster does not count.
"""

WHY = f"""
## Why: the floor

A frozen weight W (out, in) costs each token 2·out·in FLOPs forward (y = W·x) and as many backward (∂L/∂x = Wᵀ·∂L/∂y). Full
fine-tuning pays as much again for ∂L/∂W; LoRA never does. So **4 FLOPs for each frozen weight and token** are the floor of any
LoRA training whose gradients pass through the whole model.

SmolLM2-135M has {BLOCK_WEIGHTS:,} weights in the matrices of its blocks: {4 * BLOCK_WEIGHTS / 1e6:.0f} MFLOP a token. The pairs
of rank 8 add 6 FLOPs a parameter (forward, ∂A and ∂B, ∂x): {6 * PAIR_PARAMETERS / 1e6:.0f} MFLOP. Attention in a row of t
tokens adds 2·t for each block and channel forward, since a causal mask lets half of the scores through. Backward it adds two
and a half times that.

What Lorakeet leaves out, and other trainers pay for:

- **The head where there is no target.** With 49,152 words the head has {HEAD_WEIGHTS / 1e6:.0f} million weights,
{100 * HEAD_WEIGHTS / BLOCK_WEIGHTS:.0f} % on top of the blocks. A classification row has its answer as its only target. So the
head, and what follows the attention of the last block, are computed for target tokens alone (`train/text/loss`). A trainer that
makes logits of all tokens pays for all of them, in memory too.
- **Padding.** Rows are packed (`data/pack`), and attention stays within a row. A padded batch computes its padding, and the
more its rows differ in length, the more there is.
- **A second forward pass.** TRL and unsloth checkpoint gradients by default: 6 FLOPs a weight instead of 4. Here little is
saved for the backward pass, since a step is split into micro-batches of `train.micro_tokens`.
- **Memory traffic.** q, k and v with their pairs, rotary positions and attention are one autograd function. So are the gated
MLP with its three pairs, and RMSNorm (`core/fused/attention`, `core/fused/mlp_and_norm`). Tensors between their products are
recomputed or overwritten. Each function has the derivation of its backward pass.
- **Separate elementwise operations.** On Linux with AVX512_BF16 and gcc, attention over packed rows and elementwise operations
(RMSNorm, SwiGLU, rotary positions) are C. So are the products of all pairs, which would be hundreds of small ones when several
adapters share a step. The kernels are compiled on first use (`kernels/cpu`; `lorakeet doctor` says whether they are used).
Scores stay in the cache, and masked tiles are skipped. Without them torch computes the same, up to rounding.
- **Repacking of weights.** Before each product, a library rearranges a weight into the layout of the processor's registers.
Lorakeet's kernel for frozen weights does so once for all tokens, prefetches the next rows, and stores nothing for each number
of tokens. Each thread rearranges what it multiplies, in its own cache, and waits for the others only at the end. With AMX the
products are left to oneDNN, which uses its tiles; that was not measured.
- **Dispatch.** A step of a small model is thousands of operations. Dispatching one from Python takes ten times as long as in a
tight loop, since its data has left the processor's caches between two products. With C kernels, a whole decoder block is one
call in each direction, with the same bits as its parts (`core/fused/trained_block`). The call's arguments are cached, and
rebuilt when the block changes.
- **A separate addition of the pairs.** The low-rank term is added to a product with a frozen weight while that is in registers,
rounded as if it had been in memory.
- **Dequantised copies of weights.** NF4, 4-bit GPTQ, int8 and GGUF blocks are dequantised inside the product, some columns at a
time (`kernels/cpu/c/unpack_panels.c`). No weight exists in bf16 as a whole. GPTQ's words hold neighbours of a sum, so they need
no transposition. A step over NF4 was a quarter slower than over dense weights, and now takes about the same
([log](../log/training-speed.md)).
- **The slower dtype.** Whether products are faster in bf16 or in fp32 is measured when the model is loaded (`core/precision`).
Some processors have bf16 instructions and are slower with them.
- **Shared prefixes.** Tokens that all rows of a micro-batch start with (a template, a system prompt, examples) are computed
once for all of them, with exact gradients (`data/prefix`). A step's rows are grouped so that as much as possible is shared. A
shared prefix counts once among `train.micro_tokens`: with a prompt of 1,500 tokens, five rows of 100 form one micro-batch. Rows
with different prompts form separate micro-batches if that saves more than it costs. This needs no setting; dropout turns it
off. Where another attention computes (on a GPU, in fp32), only the grouping applies, and a micro-batch never exceeds its
tokens.
- **Blocks below the lowest adapter.** With `lora.layers: top:8` no gradient goes below the eighth block from the top. With
`train.keep_prefix_states` the hidden states below it are computed once for all epochs. Fewer matrices are adapted, so the
quality has to be measured: this is not the default.

## Why not at the floor, least of all with short rows

A product reaches the machine's rate with many tokens at once. Rows of 128 tokens share one product with every frozen weight,
but their attention is many small products. Norms, rotary positions, SwiGLU, softmax, casts and the optimizer read and write
memory, and compute next to nothing. None of them is among the FLOPs of the floor. [The log](../log/training-speed.md) says what
a step consists of, and what was tried and dropped.
"""

# What results called things, and what the page says.
SHOWN = {
    "Lorakeet as shipped: what rows of a micro-batch begin with is computed once": "Lorakeet as shipped, with shared prefixes",
    "Lorakeet as shipped: what all rows of a batch begin with is computed once": "Lorakeet as shipped, with shared prefixes",
    "Lorakeet, what rows begin with computed for each of them": "Lorakeet without shared prefixes",
    "Lorakeet with a frozen prefix: adapters in the top 8 layers alone": "Lorakeet, adapters in the top 8 layers alone",
    "Lorakeet with model.quantize.int8_products: frozen weights in int8, and multiplied so": "Lorakeet with int8 products",
    "Lorakeet, a step repeated while held-out loss falls (Fast Forward)": "Lorakeet with Fast Forward",
    "trains adapters in 8 of 30 layers: a quarter of the parameters": "a quarter of the parameters",
    "its products with frozen weights run in int8, which rounds what is multiplied": "frozen weights and inputs rounded to int8",
    "takes some steps again, as often as the loss on 32 more rows falls (arXiv 2409.04206)": (
        "repeats some steps while the loss on 32 more rows falls (arXiv 2409.04206)"
    ),
    "int8, brought back": "int8, dequantised",
}

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
python benchmarks/attach_vs_peft.py
make docs
```

[benchmarks/README.md](../../benchmarks/README.md) says how long each takes and what the contenders are. Each result records the
load before its first run. Times mean something on an idle machine only.
"""
