/* Blocks of ggml's types brought back to bf16: the numbers of lorakeet/quant/gguf, to the last bit, where the layouts stand;
   results below 1.2e-38 are zeros. */

#include "stored.h"

#include <string.h>

static inline float half_at(const uint8_t *bytes) {
    uint16_t half;
    memcpy(&half, bytes, sizeof half);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}

static inline __m512i low_halves(const uint8_t *bytes) {
    return _mm512_and_si512(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)), _mm512_set1_epi32(15));
}

static inline __m512i high_halves(const uint8_t *bytes) {
    return _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)), 4);
}

/* Sixteen numbers step·code. */
static inline void times(bf16 *to, __m512i codes, float step) {
    put(to, _mm512_mul_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(codes)));
}

/* Sixteen numbers step·code + offset, rounded in between. */
static inline void and_offset(bf16 *to, __m512i codes, float step, float offset) {
    __m512 product = _mm512_mul_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(codes));
    __asm__("" : "+v"(product)); /* or the compiler makes one operation of both */
    put(to, _mm512_add_ps(product, _mm512_set1_ps(offset)));
}

/* Of 32 numbers the n-th sixteen: d·(q − z), or d·q + m; of five bits the fifth ones stand by themselves. */
static void simple(int64_t kind, const uint8_t *block, int64_t n, bf16 *to) {
    int five = kind == Q5_0 || kind == Q5_1, offset = kind == Q4_1 || kind == Q5_1;
    const uint8_t *codes = block + 2 + 2 * offset + 4 * five;
    uint32_t fifth = 0;
    if (five) memcpy(&fifth, codes - 4, sizeof fifth);
    __m512i q = n ? high_halves(codes) : low_halves(codes);
    q = _mm512_mask_or_epi32(q, (__mmask16)(fifth >> 16 * n), q, _mm512_set1_epi32(16));
    if (offset) and_offset(to, q, half_at(block), half_at(block + 2));
    else times(to, _mm512_sub_epi32(q, _mm512_set1_epi32(five ? 16 : 8)), half_at(block));
}

static void eight(const uint8_t *block, int64_t n, bf16 *to) {
    times(to, _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 2) + n)), half_at(block));
}

/* Of 256 numbers the n-th sixteen: (d·s)·q − (e·m), s and m for each 32, of six bits each in twelve bytes. */
static void k_block(int64_t kind, const uint8_t *block, int64_t n, bf16 *to) {
    const uint8_t *packed = block + 4, *fifth = block + 16 + n % 2 * LANES;
    const uint8_t *codes = block + (kind == Q5_K ? 48 : 16) + n / 4 * 32 + n % 2 * LANES;
    int64_t g = n / 2, at = g & 3;
    int scale = g < 4 ? packed[at] & 63 : (packed[8 + at] & 15) | (packed[at] >> 2 & 48);
    int least = g < 4 ? packed[4 + at] & 63 : packed[8 + at] >> 4 | (packed[4 + at] >> 2 & 48);
    __m512i q = g & 1 ? high_halves(codes) : low_halves(codes);
    if (kind == Q5_K) {
        __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)fifth));
        q = _mm512_mask_or_epi32(q, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << g)), q, _mm512_set1_epi32(16));
    }
    and_offset(to, q, half_at(block) * (float)scale, -(half_at(block + 2) * (float)least));
}

/* Of 256 numbers the n-th sixteen: (d·s)·(q − 32), s for each of them; of each code four bits and two. */
static void six(const uint8_t *block, int64_t n, bf16 *to) {
    const int8_t *scales = (const int8_t *)block + 192;
    int64_t side = n / 8, group = n / 2 % 4, part = n % 2 * LANES;
    const uint8_t *low = block + side * 64 + group % 2 * 32 + part, *high = block + 128 + side * 32 + part;
    __m512i q = group < 2 ? low_halves(low) : high_halves(low);
    __m512i two = _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)high)), (unsigned)(2 * group));
    q = _mm512_or_si512(q, _mm512_slli_epi32(_mm512_and_si512(two, _mm512_set1_epi32(3)), 4));
    times(to, _mm512_sub_epi32(q, _mm512_set1_epi32(32)), half_at(block + 208) * (float)scales[n]);
}

void gguf_row(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to) {
    static const int64_t bytes[] = {18, 20, 22, 24, 34, 144, 176, 210}; /* of a block, by kind */
    int64_t own = bytes[w->kind - Q4_0], sixteens = w->kind < Q4_K ? 2 : 16;
    const uint8_t *blocks = (const uint8_t *)w->codes + row * (w->in / LANES / sixteens) * own;
    for (int64_t i = first / LANES; i < last / LANES; i++, to += LANES) {
        const uint8_t *block = blocks + i / sixteens * own;
        int64_t n = i % sixteens;
        if (w->kind == Q8_0) eight(block, n, to);
        else if (w->kind < Q4_K) simple(w->kind, block, n, to);
        else if (w->kind == Q6_K) six(block, n, to);
        else k_block(w->kind, block, n, to);
    }
}
