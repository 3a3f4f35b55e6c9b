/* Elementwise ops of a block, each one pass over memory: bf16 in and out, fp32 inside.

   States are `tokens` contiguous rows of `width` numbers, a multiple of 16. */

#include "elementwise.h"

#include <math.h>

/* y = w ∘ (x·ρ) with ρ = 1/√(mean(x²) + ε) of each token; x·ρ is rounded before w is multiplied, as transformers does. */
static inline void normed(const bf16 *x, const bf16 *weight, float rho, bf16 *y, int64_t width) {
    __m512 by = _mm512_set1_ps(rho);
    for (int64_t c = 0; c < width; c += LANES) {
        bf16 rounded[LANES];
        put(rounded, _mm512_mul_ps(wide(x + c), by));
        put(y + c, _mm512_mul_ps(wide(weight + c), wide(rounded)));
    }
}

/* ρ of one token. */
static inline float rho_of(const bf16 *x, float epsilon, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += LANES) {
        __m512 at = wide(x + c);
        sum = _mm512_fmadd_ps(at, at, sum);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)width + epsilon);
}

void norm(const bf16 *x, const bf16 *weight, float epsilon, bf16 *y, float *rho, int64_t tokens, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        rho[t] = rho_of(x + t * width, epsilon, width);
        normed(x + t * width, weight, rho[t], y + t * width, width);
    }
}

/* The norm of a + b; the rounded sum is written to b. */
void add_norm(const bf16 *a, bf16 *b, const bf16 *weight, float epsilon, bf16 *y, float *rho, int64_t tokens, int64_t width,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        bf16 *at = b + t * width;
        for (int64_t c = 0; c < width; c += LANES) put(at + c, _mm512_add_ps(wide(a + t * width + c), wide(at + c)));
        rho[t] = rho_of(at, epsilon, width);
        normed(at, weight, rho[t], y + t * width, width);
    }
}

/* Recomputes y from a saved ρ. */
void norm_again(const bf16 *x, const float *rho, const bf16 *weight, bf16 *y, int64_t tokens, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) normed(x + t * width, weight, rho[t], y + t * width, width);
}

/* ∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)), x̂ = x·ρ, rounded, and added to `beside` unless that is null. `found` may be x or ∂y. */
void norm_backward_beside(const bf16 *grad, const bf16 *x, const float *rho, const bf16 *weight, const bf16 *beside, bf16 *found,
                          int64_t tokens, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        const bf16 *g = grad + t * width, *at = x + t * width;
        __m512 sum = _mm512_setzero_ps(), by = _mm512_set1_ps(rho[t]);
        for (int64_t c = 0; c < width; c += LANES)
            sum = _mm512_fmadd_ps(_mm512_mul_ps(wide(g + c), wide(weight + c)), _mm512_mul_ps(wide(at + c), by), sum);
        __m512 share = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
        for (int64_t c = 0; c < width; c += LANES) {
            __m512 scaled = _mm512_mul_ps(wide(g + c), wide(weight + c));
            __m512 back = _mm512_mul_ps(_mm512_fnmadd_ps(_mm512_mul_ps(wide(at + c), by), share, scaled), by);
            if (beside) back = _mm512_add_ps(widened(narrow(back)), wide(beside + t * width + c));
            put(found + t * width + c, back);
        }
    }
}

void norm_backward(const bf16 *grad, const bf16 *x, const float *rho, const bf16 *weight, bf16 *found, int64_t tokens,
                   int64_t width, int threads) {
    norm_backward_beside(grad, x, rho, weight, 0, found, tokens, width, threads);
}

static inline __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)))));
}

/* h = g·σ(g)·u of 16 numbers. */
static inline void gated_lanes(const bf16 *gate, const bf16 *up, bf16 *inner) {
    __m512 g = wide(gate);
    put(inner, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), wide(up)));
}

/* `count` is a multiple of 16. */
void gated(const bf16 *gate, const bf16 *up, bf16 *inner, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) gated_lanes(gate + i, up + i, inner + i);
}

/* Rows of gate and up have `width` numbers and a stride of `step`. */
void gated_apart(const bf16 *gate, const bf16 *up, bf16 *inner, int64_t tokens, int64_t width, int64_t step, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < width; c += LANES) gated_lanes(gate + t * step + c, up + t * step + c, inner + t * width + c);
}

/* Given ∂h: overwrites g with ∂g = ∂h·u·σ·(1 + g·(1 − σ)), u with ∂u = ∂h·g·σ, and ∂h with h. */
void gated_backward(bf16 *gate, bf16 *up, bf16 *grad, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 g = wide(gate + i), u = wide(up + i), by = wide(grad + i), s = sigmoid(g), active = _mm512_mul_ps(g, s);
        __m512 slope = _mm512_fmadd_ps(_mm512_fnmadd_ps(g, s, g), s, s);
        put(gate + i, _mm512_mul_ps(_mm512_mul_ps(by, u), slope));
        put(up + i, _mm512_mul_ps(by, active));
        put(grad + i, _mm512_mul_ps(active, u));
    }
}

/* Rotates the heads of each token, (tokens, heads, 2·half), in place; `half` is a multiple of 16, cos and sin are (tokens, 2·half). */
void rotate(bf16 *states, const bf16 *cos, const bf16 *sin, int64_t tokens, int64_t heads, int64_t half, int back, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            bf16 *at = states + (t * heads + h) * 2 * half;
            rotated(at, cos + t * 2 * half, sin + t * 2 * half, half, back, at);
        }
}
