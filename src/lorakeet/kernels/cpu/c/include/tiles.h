/* Products of attention tiles (attention.c): (keys, queries), or (queries, numbers of a head).

   Every product is C (M, N) = A (M, K) · B (K, N), optionally added to C. Two neighbours along K share a 32-bit word, as VDPBF16PS
   wants: B is packed as (K/2, N) words; A's words are read one by one with any stride. Where the causal mask or a row's end cuts a
   tile, only visible parts are multiplied, in fours of keys and sixteens of queries (Seen). */
#ifndef LORAKEET_TILES_H
#define LORAKEET_TILES_H

#include "lanes.h"

#define T 64       /* queries and keys of a tile */
#define SIXTEENS 4 /* of queries, in a tile */
#define ROWS 4     /* of C at once */

/* Packs two neighbouring rows into words: (count, d) to (count/2, d). `count` is even. */
static void pairs_of_rows(const bf16 *x, int64_t count, int64_t d, uint32_t *out) {
    for (int64_t i = 0; i < count / 2; i++)
        for (int64_t c = 0; c < d; c++) out[i * d + c] = (uint32_t)x[2 * i * d + c] | (uint32_t)x[(2 * i + 1) * d + c] << 16;
}

/* Transposes a tile's words of two neighbouring numbers: (T, d/2) to (d/2, T). */
static void transposed_words(const bf16 *x, int64_t d, uint32_t *out) {
    for (int64_t i = 0; i < T; i += LANES)
        for (int64_t c = 0; c < d / 2; c += LANES) {
            __m512i words[LANES];
            for (int r = 0; r < LANES; r++) words[r] = _mm512_loadu_si512(x + (i + r) * d + 2 * c);
            transposed(words);
            for (int r = 0; r < LANES; r++) _mm512_storeu_si512(out + (c + r) * T + i, words[r]);
        }
}

enum { ANEW, ADDED, SCALED }; /* what happens to C: overwritten, added to, or each row scaled and then added to */

/* C (rows, 16·vectors) = A·B, optionally added to C; all sums stay in registers. */
static inline __attribute__((always_inline)) void block(const int rows, const int vectors, const int add, const uint32_t *a,
                                                        int64_t row, int64_t pair, const uint32_t *b, int64_t wide, float *c,
                                                        int64_t out, int64_t pairs, const float *by) {
    __m512 sum[4 * ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n++) {
            sum[r * vectors + n] = add == ANEW ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * out + n * LANES);
            if (add == SCALED) sum[r * vectors + n] = _mm512_mul_ps(sum[r * vectors + n], _mm512_set1_ps(by[r]));
        }
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n++) right[n] = (__m512bh)_mm512_loadu_si512(b + k * wide + n * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * row + k * pair]);
#pragma GCC unroll 4
            for (int n = 0; n < vectors; n++) sum[r * vectors + n] = _mm512_dpbf16_ps(sum[r * vectors + n], left, right[n]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n++) _mm512_storeu_ps(c + r * out + n * LANES, sum[r * vectors + n]);
}

/* C (ROWS, N) = A (ROWS, 2·pairs) · B (2·pairs, N). With `add`, added to C, or to C's rows scaled by `by`. N is a multiple of 64. */
static inline void strip(const uint32_t *a, int64_t row, int64_t pair, const uint32_t *b, float *c, int64_t n, int64_t pairs, int add,
                         const float *by) {
    for (int64_t j = 0; j < n; j += 4 * LANES)
        if (add == SCALED) block(ROWS, 4, SCALED, a, row, pair, b + j, n, c + j, n, pairs, by);
        else if (add) block(ROWS, 4, ADDED, a, row, pair, b + j, n, c + j, n, pairs, 0);
        else block(ROWS, 4, ANEW, a, row, pair, b + j, n, c + j, n, pairs, 0);
}

/* Which keys of a tile the `count` queries of a tile see: query r sees keys up to `last` + r. */
typedef struct {
    int64_t last, count, sixteens, keys[SIXTEENS], all; /* of queries; keys that any query of each sixteen sees, in fours; their maximum */
} Seen;

static Seen seen_of(int64_t last, int64_t count) {
    Seen seen = {last, count, (count + LANES - 1) / LANES, {0}, 0};
    for (int64_t l = 0; l < seen.sixteens; l++) {
        int64_t queries = (l + 1) * LANES < count ? (l + 1) * LANES : count, keys = (last + queries + ROWS - 1) / ROWS * ROWS;
        seen.keys[l] = keys < 0 ? 0 : keys < T ? keys : T;
    }
    seen.all = seen.keys[seen.sixteens - 1];
    return seen;
}

/* The first sixteen of queries of which any sees the key. */
static inline int64_t first_that_sees(const Seen *seen, int64_t key) {
    int64_t l = 0;
    while (key >= seen->keys[l]) l++;
    return l;
}

/* Mask of the sixteen queries that see the key; the first of them sees keys up to `last`. */
static inline __mmask16 sees(int64_t key, int64_t last) {
    int64_t hidden = key - last;
    return hidden <= 0 ? 0xffff : hidden >= LANES ? 0 : (__mmask16)(0xffff << hidden);
}

/* The visible part of C (T, T) = A (T, d) · B (d, T): rows are keys, of d/2 words each, columns are queries. */
static void scores_of(const Seen *seen, const bf16 *keys, const uint32_t *queries, float *scores, int64_t d) {
    const uint32_t *a = (const uint32_t *)keys;
    int64_t row = d / 2;
    for (int64_t key = 0; key < seen->all;) {
        int64_t first = first_that_sees(seen, key), end = seen->keys[first];
        const uint32_t *from = a + key * row, *b = queries + first * LANES;
        float *to = scores + key * T + first * LANES;
        switch (seen->sixteens - first) {
        case 4: block(4, 4, ANEW, from, row, 1, b, T, to, T, row, 0), key += 4; break;
        case 3: block(4, 3, ANEW, from, row, 1, b, T, to, T, row, 0), key += 4; break;
        case 2:
            if (end - key >= 8) block(8, 2, ANEW, from, row, 1, b, T, to, T, row, 0), key += 8;
            else block(4, 2, ANEW, from, row, 1, b, T, to, T, row, 0), key += 4;
            break;
        default:
            if (end - key >= 16) block(16, 1, ANEW, from, row, 1, b, T, to, T, row, 0), key += 16;
            else if (end - key >= 8) block(8, 1, ANEW, from, row, 1, b, T, to, T, row, 0), key += 8;
            else block(4, 1, ANEW, from, row, 1, b, T, to, T, row, 0), key += 4;
        }
    }
}

/* C (T, d) = or += A (T, T) · B (T, d) over the visible part. A has queries as rows, as (keys/2, queries) words; `by` scales C's rows. */
static void by_queries(const Seen *seen, const uint32_t *a, const uint32_t *b, float *c, int64_t d, int add, const float *by) {
    for (int64_t r = 0; r < seen->count; r += ROWS)
        strip(a + r, 1, T, b, c + r * d, d, seen->keys[r / LANES] / 2, add, add == SCALED ? by + r : 0);
}

/* The same where A has keys as rows, as (keys, queries/2) words; only visible keys. */
static void by_keys(const Seen *seen, const bf16 *weights, const uint32_t *b, float *c, int64_t d, int add) {
    const uint32_t *a = (const uint32_t *)weights;
    for (int64_t key = 0; key < seen->all; key += ROWS) {
        int64_t from = first_that_sees(seen, key) * (LANES / 2), pairs = seen->sixteens * (LANES / 2) - from;
        strip(a + key * (T / 2) + from, T / 2, 1, b + from * d, c + key * d, d, pairs, add, 0);
    }
}

#endif
