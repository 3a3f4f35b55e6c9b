/* Products of a few tokens with frozen weights, which cost as much as reading the weights: y = x·Wᵀ in bf16, sums in fp32.

   A weight (n, k) is stored in panels of 16 outputs, each (k/2, 16) words of two neighbouring numbers along k, as VDPBF16PS wants:
   a product reads contiguous memory. The last panel is padded with zeros.

   Each output is summed along k in one register, whatever the number of tokens, so that a token's result does not depend on the
   other tokens. */

#include "panels.h"

#define TOKENS 16   /* at most, that share one read of a panel: as many sums as there are registers for */
#define PANELS 2    /* that a thread takes at once */
#define AHEAD 2048  /* bytes to prefetch: the processor's own prefetcher stops at the end of each page */

/* Sums of `tokens` times `panels` times 16 outputs, at most 16 registers of them. */
static inline __attribute__((always_inline)) void sums(const int tokens, const int panels, const uint32_t *x, int64_t words,
                                                       const uint32_t *weight, __m512 *found) {
    __m512 sum[TOKENS];
#pragma GCC unroll 16
    for (int i = 0; i < tokens * panels; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++)
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
            const uint32_t *at = weight + (p * words + k) * LANES;
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            __m512bh right = (__m512bh)_mm512_loadu_si512(at);
#pragma GCC unroll 16
            for (int t = 0; t < tokens; t++)
                sum[p * tokens + t] =
                    _mm512_dpbf16_ps(sum[p * tokens + t], right, (__m512bh)_mm512_set1_epi32((int)x[t * words + k]));
        }
#pragma GCC unroll 16
    for (int i = 0; i < tokens * panels; i++) found[i] = sum[i];
}

/* The same for up to 16 `tokens` and one or two `panels`, both at once if there are registers for them. */
static void any_sums(int tokens, int panels, const uint32_t *x, int64_t words, const uint32_t *weight, __m512 *found) {
#define ONE_BY_ONE(t) \
    for (int p = 0; p < panels; p++) sums(t, 1, x, words, weight + p * words * LANES, found + p * t)
#define CASE(t, most)                                                \
    case t:                                                          \
        if (panels == most) sums(t, most, x, words, weight, found);  \
        else ONE_BY_ONE(t);                                          \
        break;
    switch (tokens) {
        CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2) CASE(7, 2) CASE(8, 2)
        CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1) CASE(13, 1) CASE(14, 1) CASE(15, 1) CASE(16, 1)
    }
}

static inline int64_t parts(int64_t outputs) { return (outputs + PANELS * LANES - 1) / (PANELS * LANES); }

void linear(const bf16 *x, const Product *products, int64_t count, bf16 *y, int64_t tokens, int64_t width, int64_t columns,
            int threads) {
    if (!tokens) return;
    int64_t all = 0, words = width / 2, rounds = (tokens + TOKENS - 1) / TOKENS, at_once = (tokens + rounds - 1) / rounds;
    for (int64_t i = 0; i < count; i++) all += parts(products[i].outputs);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < all; part++) {
        const Product *of = products;
        int64_t own = part;
        for (; own >= parts(of->outputs); of++) own -= parts(of->outputs);
        int64_t left = (of->outputs - own * PANELS * LANES + LANES - 1) / LANES;
        int panels = (int)(left < PANELS ? left : PANELS);
        for (int64_t first = 0; first < tokens; first += at_once) {
            int some = (int)(tokens - first < at_once ? tokens - first : at_once);
            __m512 found[PANELS * TOKENS];
            any_sums(some, panels, (const uint32_t *)x + first * words, words, of->weight + own * PANELS * LANES * words, found);
            for (int p = 0; p < panels; p++) {
                int64_t begin = (own * PANELS + p) * LANES, rest = of->outputs - begin;
                __mmask16 there = rest < LANES ? (__mmask16)((1u << rest) - 1) : (__mmask16)0xffff;
                __m512 bias = of->bias ? widened(_mm256_maskz_loadu_epi16(there, of->bias + begin)) : _mm512_setzero_ps();
                for (int t = 0; t < some; t++)
                    _mm256_mask_storeu_epi16(y + (first + t) * columns + of->column + begin, there,
                                             narrow(_mm512_add_ps(found[p * some + t], bias)));
            }
        }
    }
}
