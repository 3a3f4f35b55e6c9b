/* Elementwise ops of a block: RMSNorm, gated SiLU, rotary positions (elementwise.c). */
#ifndef LORAKEET_ELEMENTWISE_H
#define LORAKEET_ELEMENTWISE_H

#include "lanes.h"

/* Rotates a head's halves (a, b), `half` numbers each, to (a·c₁ − b·s₁, b·c₂ + a·s₂), or, with `back`, to (a·c₁ + b·s₂, b·c₂ − a·s₁).
   `to` may be x. */
static inline void rotated(const bf16 *x, const bf16 *cos, const bf16 *sin, int64_t half, int back, bf16 *to) {
    for (int64_t c = 0; c < half; c += LANES) {
        __m512 a = wide(x + c), b = wide(x + half + c), s1 = wide(sin + c), s2 = wide(sin + half + c);
        __m512 first = _mm512_mul_ps(a, wide(cos + c)), second = _mm512_mul_ps(b, wide(cos + half + c));
        put(to + c, back ? _mm512_fmadd_ps(b, s2, first) : _mm512_fnmadd_ps(b, s1, first));
        put(to + half + c, back ? _mm512_fnmadd_ps(a, s1, second) : _mm512_fmadd_ps(a, s2, second));
    }
}

/* y = w ∘ (x·ρ) with ρ = 1/√(mean(x²) + ε) of each token. */
void norm(const bf16 *x, const bf16 *weight, float epsilon, bf16 *y, float *rho, int64_t tokens, int64_t width, int threads);

/* The norm of a + b; the rounded sum is written to b. */
void add_norm(const bf16 *a, bf16 *b, const bf16 *weight, float epsilon, bf16 *y, float *rho, int64_t tokens, int64_t width,
              int threads);

/* Recomputes y from a saved ρ; ∂x from ∂y; and ∂x rounded and added to `beside`, the gradient of the residual. */
void norm_again(const bf16 *x, const float *rho, const bf16 *weight, bf16 *y, int64_t tokens, int64_t width, int threads);
void norm_backward(const bf16 *grad, const bf16 *x, const float *rho, const bf16 *weight, bf16 *found, int64_t tokens,
                   int64_t width, int threads);
void norm_backward_beside(const bf16 *grad, const bf16 *x, const float *rho, const bf16 *weight, const bf16 *beside, bf16 *found,
                          int64_t tokens, int64_t width, int threads);

/* silu(gate) ∘ up. Backward overwrites gate and up with ∂gate and ∂up, and the gradient with silu(gate) ∘ up. */
void gated(const bf16 *gate, const bf16 *up, bf16 *inner, int64_t count, int threads);
void gated_backward(bf16 *gate, bf16 *up, bf16 *grad, int64_t count, int threads);

/* Rotates the heads of each token, (tokens, heads, 2·half), in place. */
void rotate(bf16 *states, const bf16 *cos, const bf16 *sin, int64_t tokens, int64_t heads, int64_t half, int back, int threads);

/* silu(gate) ∘ up of rows with a stride of `step` numbers. */
void gated_apart(const bf16 *gate, const bf16 *up, bf16 *inner, int64_t tokens, int64_t width, int64_t step, int threads);

#endif
