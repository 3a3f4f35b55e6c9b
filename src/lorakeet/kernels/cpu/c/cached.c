/* Attention of new tokens over the keys and values of earlier ones in a KV cache.

   softmax(s·q·kᵀ)·v for each new token over the tokens of its sequence up to itself, in fp32. Sums run over a token's keys in a fixed
   order, so that its result does not depend on the other tokens of the batch. Softmax to base 2. */

#include "cached.h"
#include "elementwise.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define WORD_LANES 32 /* bf16 numbers of a register */
#define AT_ONCE 4     /* heads that share one read of a key, and registers of 16 values of a head that are summed at once */

/* log₂(e)·scale times the products of `heads` queries (heads, d) with `count` keys (count, d), to (heads, stride). */
static inline __attribute__((always_inline)) void scored(const int heads, const bf16 *q, const bf16 *keys, int64_t count,
                                                         int64_t d, float scale, float *scores, int64_t stride) {
    for (int64_t j = 0; j < count; j++) {
        __m512 sum[AT_ONCE];
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) sum[h] = _mm512_setzero_ps();
        for (int64_t c = 0; c < d; c += WORD_LANES) {
            __m512bh key = (__m512bh)_mm512_loadu_si512(keys + j * d + c);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++)
                sum[h] = _mm512_dpbf16_ps(sum[h], (__m512bh)_mm512_loadu_si512(q + h * d + c), key);
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) scores[h * stride + j] = LOG2E * scale * _mm512_reduce_add_ps(sum[h]);
    }
}

/* Softmax of scores (count,), in place, padded with zeros to a whole register. */
static void softmax(float *scores, int64_t count) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    int64_t whole = (count + LANES - 1) / LANES * LANES;
    for (int64_t j = count; j < whole; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < whole; j += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + j));
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t j = 0; j < whole; j += LANES) {
        __m512 part = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + j), top));
        sum = _mm512_add_ps(sum, part);
        _mm512_storeu_ps(scores + j, part);
    }
    __m512 by = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int64_t j = 0; j < whole; j += LANES) _mm512_storeu_ps(scores + j, _mm512_mul_ps(_mm512_loadu_ps(scores + j), by));
}

/* Σ weight·value over `count` values (count, d), to (d,). */
static void weighed(const float *share, const bf16 *values, int64_t count, int64_t d, bf16 *out) {
    for (int64_t c = 0; c < d; c += AT_ONCE * LANES) {
        __m512 sum[AT_ONCE];
#pragma GCC unroll 4
        for (int n = 0; n < AT_ONCE; n++) sum[n] = _mm512_setzero_ps();
        for (int64_t j = 0; j < count; j++) {
            __m512 by = _mm512_set1_ps(share[j]);
#pragma GCC unroll 4
            for (int n = 0; n < AT_ONCE; n++) sum[n] = _mm512_fmadd_ps(by, wide(values + j * d + c + n * LANES), sum[n]);
        }
#pragma GCC unroll 4
        for (int n = 0; n < AT_ONCE; n++) put(out + c + n * LANES, sum[n]);
    }
}

static int64_t padded(int64_t longest) { return (longest + LANES - 1) / LANES * LANES; }

int64_t cached_scratch(const Heads *of, int64_t longest) {
    int64_t bytes = of->heads / of->kv * (padded(longest) * (int64_t)sizeof(float) + of->d * (int64_t)sizeof(bf16));
    return (bytes + 63) / 64 * 64;
}

void cached_attention(const Heads *of, const NewTokens *new, const bf16 *states, bf16 *keys, bf16 *values, bf16 *out,
                      uint8_t *scratch, int threads) {
    int64_t d = of->d, heads = of->heads, kv = of->kv, group = heads / kv, step = (heads + 2 * kv) * d;
    int64_t stride = padded(new->longest), size = cached_scratch(of, new->longest);
#pragma omp parallel num_threads(threads)
    {
        float *scores = (float *)(scratch + omp_get_thread_num() * size);
        bf16 *q = (bf16 *)(scores + group * stride);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < new->count; t++)
            for (int64_t h = 0; h < kv; h++) {
                const bf16 *key = states + t * step + (heads + h) * d, *value = key + kv * d;
                int64_t place = ((new->slots[t] * kv + h) * new->capacity + new->positions[t]) * d;
                rotated(key, new->cos + t * d, new->sin + t * d, d / 2, 0, keys + place);
                memcpy(values + place, value, d * sizeof(bf16));
            }
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < new->count * kv; part++) {
            int64_t t = part / kv, h = part % kv, count = new->positions[t] + 1;
            int64_t first = (new->slots[t] * kv + h) * new->capacity * d;
            for (int64_t g = 0; g < group; g++)
                rotated(states + t * step + (h * group + g) * d, new->cos + t * d, new->sin + t * d, d / 2, 0, q + g * d);
            for (int64_t g = 0; g < group; g += AT_ONCE)
                switch (group - g < AT_ONCE ? group - g : AT_ONCE) {
#define HEADS(n) case n: scored(n, q + g * d, keys + first, count, d, of->scale, scores + g * stride, stride); break;
                    HEADS(1) HEADS(2) HEADS(3) HEADS(4)
                }
            for (int64_t g = 0; g < group; g++) {
                softmax(scores + g * stride, count);
                weighed(scores + g * stride, values + first, count, d, out + (t * heads + h * group + g) * d);
            }
        }
    }
}
