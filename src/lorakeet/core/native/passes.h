/* What a whole block takes of passes.c. */
#ifndef LORAKEET_PASSES_H
#define LORAKEET_PASSES_H

#include "lanes.h"

/* y = w ∘ (x·ρ) with ρ = 1/√(mean(x²) + ε) of each token. */
void norm(const bf16 *x, const bf16 *weight, float epsilon, bf16 *y, float *rho, int64_t tokens, int64_t width, int threads);

/* silu(gate) ∘ up of rows that lie `step` numbers apart. */
void gated_apart(const bf16 *gate, const bf16 *up, bf16 *inner, int64_t tokens, int64_t width, int64_t step, int threads);

#endif
