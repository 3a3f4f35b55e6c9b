/* Adds the low-rank pairs of adapters to the outputs of layers, each token with its own pairs: bf16 in memory, sums in fp32.

   A copy has the A and B of a layer in the order in which they are read, 64 bytes at a time: A as (width/32, rank, 32), then B as
   (outputs/16, rank/2, 16, 2); an odd rank is padded with zeros. Widths are multiples of 32, outputs of 16. A token is summed in a
   fixed order, whatever the other tokens are. */

#include "pairs.h"

#define LINE (2 * LANES) /* numbers */
#define TOKENS 4 /* of one share that are multiplied together: A and B are read once for them */

static inline bf16 rounded(float x) { return (bf16)_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x))); }

/* Dot products of `rows` rows of A with `count` tokens, rounded, into h (count, rank). */
static inline __attribute__((always_inline)) void dots(const bf16 *const *x, int count, const bf16 *A, int rows, int64_t width,
                                                       bf16 *h, int64_t rank) {
    __m512 sums[8][TOKENS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) sums[r][t] = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += LINE, A += rank * LINE) {
        __m512bh at[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) at[t] = both(x[t] + c);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512bh a = both(A + r * LINE);
#pragma GCC unroll 4
            for (int t = 0; t < count; t++) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], a, at[t]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) h[t * rank + r] = rounded(_mm512_reduce_add_ps(sums[r][t]));
}

static inline __attribute__((always_inline)) void add_tokens(const int64_t *tokens, int count, const Copy *from, const Layer *to,
                                                             const bf16 *x, int64_t stride, int64_t width) {
    int64_t rank = from->rank, r = 0;
    const bf16 *A = from->at, *B = A + rank * width, *xs[TOKENS];
    bf16 h[count * rank], *ys[TOKENS];
    for (int t = 0; t < count; t++) {
        xs[t] = x + tokens[t] * stride;
        ys[t] = to->y + tokens[t] * to->stride;
    }
    if (count == 1)
        for (; r + 8 <= rank; r += 8) dots(xs, count, A + r * LINE, 8, width, h + r, rank);
    for (; r + 4 <= rank; r += 4) dots(xs, count, A + r * LINE, 4, width, h + r, rank);
    for (; r < rank; r += 2) dots(xs, count, A + r * LINE, 2, width, h + r, rank);
    for (int64_t c = 0; c < to->outputs; c += LANES, B += rank * LANES) {
        __m512 sums[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) sums[t] = _mm512_setzero_ps();
        for (int64_t p = 0; p < rank; p += 2) {
            __m512bh b = both(B + p * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < count; t++) sums[t] = _mm512_dpbf16_ps(sums[t], b, two_of(h + t * rank + p));
        }
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) put(ys[t] + c, _mm512_add_ps(wide(ys[t] + c), sums[t]));
    }
}

static void add_some(const int64_t *tokens, int64_t count, const Copy *from, const Layer *to, const bf16 *x, int64_t stride,
                     int64_t width) {
    switch (count) {
    case 1: add_tokens(tokens, 1, from, to, x, stride, width); break;
    case 2: add_tokens(tokens, 2, from, to, x, stride, width); break;
    case 3: add_tokens(tokens, 3, from, to, x, stride, width); break;
    default: add_tokens(tokens, TOKENS, from, to, x, stride, width);
    }
}

void add_pairs(const Share *shares, int64_t count, const Layer *layers, int64_t layer_count, const bf16 *x, int64_t stride,
               int64_t width, int threads) {
    int64_t parts = 0;
    for (int64_t s = 0; s < count; s++) parts += (shares[s].count + TOKENS - 1) / TOKENS * layer_count;
#pragma omp parallel for schedule(static) num_threads(threads) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        const Share *of = shares;
        const Layer *to = layers + part % layer_count;
        int64_t first = part / layer_count; /* among all parts, then within the share */
        for (; first >= (of->count + TOKENS - 1) / TOKENS; of++) first -= (of->count + TOKENS - 1) / TOKENS;
        int64_t left = of->count - first * TOKENS;
        const Copy *from = of->copies + to->number;
        if (from->rank) add_some(of->tokens + first * TOKENS, left < TOKENS ? left : TOKENS, from, to, x, stride, width);
    }
}

enum { FP32, BF16, FP16 };

static inline __m512 numbers(const void *from, int64_t first, int64_t count, int64_t kind) { /* up to 16, then zeros */
    __mmask16 some = count < LANES ? (__mmask16)((1u << count) - 1) : 0xffff;
    if (kind == FP32) return _mm512_maskz_loadu_ps(some, (const float *)from + first);
    __m256i half = _mm256_maskz_loadu_epi16(some, (const bf16 *)from + first);
    if (kind == FP16) return _mm512_cvtph_ps(half);
    return widened(half);
}

typedef struct {
    const void *A, *B; /* (rank, width) and (outputs, rank) */
    int64_t kind_a, kind_b, rank, width, outputs;
    int64_t total;     /* the rank of the whole copy */
    bf16 *to_a, *to_b; /* where this pair's part starts */
} Factors;

static void copy_a(const Factors *of) {
    for (int64_t r = 0; r < of->rank; r++)
        for (int64_t c = 0; c < of->width; c += LANES)
            put(of->to_a + (c / LINE * of->total + r) * LINE + c % LINE, numbers(of->A, r * of->width + c, LANES, of->kind_a));
    if (of->rank % 2)
        for (int64_t c = 0; c < of->width; c += LINE)
            _mm512_storeu_si512(of->to_a + (c / LINE * of->total + of->rank) * LINE, _mm512_setzero_si512());
}

static void copy_b(const Factors *of, float scale) {
    int64_t rank = of->rank, filled = (rank + LANES - 1) / LANES * LANES, words = filled / 2;
    bf16 rows[LANES * filled];
    __m512i each = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm512_set1_epi32((int)words));
    __m512 by = _mm512_set1_ps(scale);
    for (int64_t c = 0; c < of->outputs; c += LANES) {
        for (int64_t o = 0; o < LANES; o++)
            for (int64_t r = 0; r < rank; r += LANES)
                put(rows + o * filled + r, _mm512_mul_ps(numbers(of->B, (c + o) * rank + r, rank - r, of->kind_b), by));
        for (int64_t p = 0; 2 * p < rank; p++)
            _mm512_storeu_si512(of->to_b + c * of->total + p * LINE, _mm512_i32gather_epi32(each, (const int *)rows + p, 4));
    }
}

/* Copies every A, and every B times its scale, into the layout above. */
void copy_pairs(const Factors *all, const float *scales, int64_t count, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        copy_a(all + i);
        copy_b(all + i, scales[i]);
    }
}
