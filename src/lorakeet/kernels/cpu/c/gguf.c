/* Dequantises blocks of ggml's types to bf16, bit for bit as lorakeet/quant/gguf, which documents the layouts, except that results
   below 1.2e-38 are zeros. */

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

/* Writes sixteen numbers step·code. */
static inline void times(bf16 *to, __m512i codes, float step) {
    put(to, _mm512_mul_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(codes)));
}

/* Writes sixteen numbers step·code + offset, with the product rounded first. */
static inline void and_offset(bf16 *to, __m512i codes, float step, float offset) {
    __m512 product = _mm512_mul_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(codes));
    __asm__("" : "+v"(product)); /* keeps the compiler from fusing both */
    put(to, _mm512_add_ps(product, _mm512_set1_ps(offset)));
}

#define INLINE static inline __attribute__((always_inline))

/* The functions below write the sixteens `first` … `last` − 1 of a block. */

/* 32 numbers: d·(q − z), or d·q + m; the fifth bits of 5-bit types are stored separately. */
INLINE void simple(int64_t kind, const uint8_t *block, int first, int last, bf16 *to) {
    int five = kind == Q5_0 || kind == Q5_1, offset = kind == Q4_1 || kind == Q5_1;
    const uint8_t *codes = block + 2 + 2 * offset + 4 * five;
    uint32_t fifth = 0;
    if (five) memcpy(&fifth, codes - 4, sizeof fifth);
    for (int n = first; n < last; n++, to += LANES) {
        __m512i q = n ? high_halves(codes) : low_halves(codes);
        q = _mm512_mask_or_epi32(q, (__mmask16)(fifth >> 16 * n), q, _mm512_set1_epi32(16));
        if (offset) and_offset(to, q, half_at(block), half_at(block + 2));
        else times(to, _mm512_sub_epi32(q, _mm512_set1_epi32(five ? 16 : 8)), half_at(block));
    }
}

INLINE void eight(const uint8_t *block, int first, int last, bf16 *to) {
    for (int n = first; n < last; n++, to += LANES)
        times(to, _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 2) + n)), half_at(block));
}

/* 256 numbers: (d·s)·q − (e·m), s and m for each 32, of six bits each in twelve bytes. */
INLINE void k_block(int64_t kind, const uint8_t *block, int first, int last, bf16 *to) {
    const uint8_t *packed = block + 4, *fifth = block + 16, *codes = block + (kind == Q5_K ? 48 : 16);
    float d = half_at(block), e = half_at(block + 2);
    for (int n = first; n < last;) {
        int g = n / 2, at = g & 3, scale = g < 4 ? packed[at] & 63 : (packed[8 + at] & 15) | (packed[at] >> 2 & 48);
        int least = g < 4 ? packed[4 + at] & 63 : packed[8 + at] >> 4 | (packed[4 + at] >> 2 & 48);
        float step = d * (float)scale, offset = -(e * (float)least);
        for (int stop = 2 * g + 2 < last ? 2 * g + 2 : last; n < stop; n++, to += LANES) {
            const uint8_t *own = codes + g / 2 * 32 + n % 2 * LANES;
            __m512i q = g & 1 ? high_halves(own) : low_halves(own);
            if (kind == Q5_K) {
                __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(fifth + n % 2 * LANES)));
                q = _mm512_mask_or_epi32(q, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << g)), q, _mm512_set1_epi32(16));
            }
            and_offset(to, q, step, offset);
        }
    }
}

/* 256 numbers: (d·s)·(q − 32), s for each 16; each code is stored as four bits and two. */
INLINE void six(const uint8_t *block, int first, int last, bf16 *to) {
    const int8_t *scales = (const int8_t *)block + 192;
    float d = half_at(block + 208);
#pragma GCC unroll 16
    for (int n = first; n < last; n++, to += LANES) {
        int side = n / 8, group = n / 2 % 4, part = n % 2 * LANES;
        const uint8_t *low = block + side * 64 + group % 2 * 32 + part, *high = block + 128 + side * 32 + part;
        __m512i q = group < 2 ? low_halves(low) : high_halves(low);
        __m512i two = _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)high)), (unsigned)(2 * group));
        q = _mm512_or_si512(q, _mm512_slli_epi32(_mm512_and_si512(two, _mm512_set1_epi32(3)), 4));
        times(to, _mm512_sub_epi32(q, _mm512_set1_epi32(32)), d * (float)scales[n]);
    }
}

INLINE void sixteens(int64_t kind, const uint8_t *block, int first, int last, bf16 *to) {
    if (kind == Q8_0) eight(block, first, last, to);
    else if (kind < Q4_K) simple(kind, block, first, last, to);
    else if (kind == Q6_K) six(block, first, last, to);
    else k_block(kind, block, first, last, to);
}

int64_t gguf_block(int64_t kind, int64_t *bytes) {
    static const int64_t by_kind[] = {18, 20, 22, 24, 34, 144, 176, 210};
    *bytes = by_kind[kind - Q4_0];
    return kind < Q4_K ? 32 : 256;
}

void gguf_row(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to) {
    int64_t own, size = gguf_block(w->kind, &own);
    const uint8_t *blocks = (const uint8_t *)w->codes + row * (w->in / size) * own;
    for (int64_t c = first; c < last;) {
        int64_t begin = c / size * size, stop = begin + size < last ? begin + size : last;
        const uint8_t *block = blocks + c / size * own;
        if (stop - c == 256) sixteens(w->kind, block, 0, 16, to); /* whole blocks have faster loops */
        else sixteens(w->kind, block, (int)((c - begin) / LANES), (int)((stop - begin) / LANES), to);
        to += stop - c, c = stop;
    }
}
