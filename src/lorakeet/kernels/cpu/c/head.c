/* Losses of a head's logits, and their gradients in place: L = log Σ exp z − z_t, ∂L/∂z = softmax(z) − onehot(t), in fp32.

   Logits are bf16, in the layout that the products with a head's tiles give: one block (tokens, columns) after another, each of
   `tile` columns of the vocabulary; the last may be narrower. A row is read three times, from the L2 cache. */

#include "lanes.h"

#include <math.h>

/* Sixteen logits from column `at` of a row, −∞ beyond its end. */
static inline __m512 some_of(const bf16 *row, int64_t at, int64_t columns) {
    if (at + LANES <= columns) return wide(row + at);
    __mmask16 there = (__mmask16)((1u << (columns - at)) - 1);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, widened(_mm256_maskz_loadu_epi16(there, row + at)));
}

typedef struct {
    bf16 *logits;
    int64_t tokens, vocabulary, tile;
} Logits;

/* A token's logits in the tile that starts at `start`, and their number. */
static inline bf16 *row_of(const Logits *z, int64_t token, int64_t start, int64_t *columns) {
    *columns = start + z->tile < z->vocabulary ? z->tile : z->vocabulary - start;
    return z->logits + z->tokens * start + token * *columns;
}

static float loss_of(const Logits *z, int64_t token, int64_t target, int wants_grad) {
    __m512 high = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    int64_t columns;
    for (int64_t start = 0; start < z->vocabulary; start += z->tile) {
        const bf16 *row = row_of(z, token, start, &columns);
        for (int64_t c = 0; c < columns; c += LANES) high = _mm512_max_ps(high, some_of(row, c, columns));
    }
    float top = _mm512_reduce_max_ps(high);
    __m512 factor = _mm512_set1_ps(LOG2E), less = _mm512_set1_ps(top); /* subtracted first: e⁰ of the largest is 1 */
    for (int64_t start = 0; start < z->vocabulary; start += z->tile) {
        const bf16 *row = row_of(z, token, start, &columns);
        for (int64_t c = 0; c < columns; c += LANES)
            total = _mm512_add_ps(total, exp2_of(_mm512_mul_ps(_mm512_sub_ps(some_of(row, c, columns), less), factor)));
    }
    float sum = _mm512_reduce_add_ps(total);
    int64_t begin = target / z->tile * z->tile;
    bf16 *at = row_of(z, token, begin, &columns) + (target - begin);
    union { uint32_t bits; float value; } chosen = {(uint32_t)*at << 16};
    if (wants_grad) {
        float likelihood = 0;
        for (int64_t start = 0; start < z->vocabulary; start += z->tile) {
            bf16 *row = row_of(z, token, start, &columns);
            __m512 by = _mm512_set1_ps(1.0f / sum);
            for (int64_t c = 0; c < columns; c += LANES) {
                __m512 p = _mm512_mul_ps(exp2_of(_mm512_mul_ps(_mm512_sub_ps(some_of(row, c, columns), less), factor)), by);
                if (at >= row + c && at < row + c + LANES && at < row + columns) {
                    float own[LANES];
                    _mm512_storeu_ps(own, p);
                    likelihood = own[at - row - c];
                }
                __mmask16 there = columns - c < LANES ? (__mmask16)((1u << (columns - c)) - 1) : 0xffff;
                _mm256_mask_storeu_epi16(row + c, there, narrow(p));
            }
        }
        bf16 rounded[LANES];
        put(rounded, _mm512_set1_ps(likelihood - 1.0f));
        *at = rounded[0];
    }
    return logf(sum) + top - chosen.value;
}

/* `targets` are within the vocabulary; `wants_grad` overwrites the logits with their gradient. */
void head_losses(bf16 *logits, const int64_t *targets, float *losses, int64_t tokens, int64_t vocabulary, int64_t tile,
                 int wants_grad, int threads) {
    Logits z = {logits, tokens, vocabulary, tile};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) losses[t] = loss_of(&z, t, targets[t], wants_grad);
}
