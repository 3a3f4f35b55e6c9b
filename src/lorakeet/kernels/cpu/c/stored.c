/* Dequantises frozen weights to bf16, bit for bit as lorakeet/quant (nf4, gptq, int8, gguf), except that results below 1.2e-38 are
   zeros. */

#include "gptq.h"

#define LINE 64   /* bytes of a cache line */
#define OUTER 256 /* blocks of NF4 that share one outer scale */

/* Keeps the compiler from fusing a product with the sum after it. */
static inline float apart(float x) {
    __asm__("" : "+x"(x));
    return x;
}

/* Numbers first … last − 1, multiples of 16: levels[code] · scale of the block. */
static void nf4(const Stored *w, int64_t first, int64_t last, bf16 *to) {
    const uint8_t *codes = w->codes;
    const __m512 levels = _mm512_loadu_ps(w->levels);
    for (int64_t i = first, block = first / w->size; i < last; block++) {
        int64_t stop = (block + 1) * w->size < last ? (block + 1) * w->size : last;
        float scale;
        if (w->outer) {
            float outer = ((const float *)w->outer)[block / OUTER], mean = *(const float *)w->more;
            scale = apart(w->steps[((const uint8_t *)w->scales)[block]] * outer) + mean;
        } else scale = ((const float *)w->scales)[block];
        __m512 by = _mm512_set1_ps(scale);
        for (; i < stop; i += LANES) {
            /* The first code of a byte is its high half. */
            __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
            __m128i both = _mm_or_si128(_mm_srli_epi16(bytes, 4), _mm_slli_epi16(_mm_and_si128(bytes, _mm_set1_epi16(15)), 8));
            put(to + i - first, _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), levels), by));
        }
    }
}

static void gptq(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to, int64_t stride) {
    Grid grid = NO_GRID;
    for (int64_t c = first; c < last; c += LANES) {
        __m512i columns[LANES];
        for (int64_t k = 0; k < LANES; k++) columns[k] = _mm512_castps_si512(gptq_column(w, row, c + k, &grid));
        transposed(columns);
        for (int64_t r = 0; r < LANES; r++) put(to + r * stride + c - first, _mm512_castsi512_ps(columns[r]));
    }
}

static void int8(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to) {
    const int8_t *codes = (const int8_t *)w->codes + row * w->in;
    __m512 by = _mm512_set1_ps(((const float *)w->scales)[row]);
    for (int64_t c = first; c < last; c += LANES) {
        __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + c)));
        put(to + c - first, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), by));
    }
}

void stored_part(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to, int64_t stride) {
    if (w->kind == GPTQ) {
        gptq(w, row, first, last, to, stride);
        return;
    }
    for (int64_t r = row; r < row + LANES; r++, to += stride) {
        if (w->kind == NF4) nf4(w, r * w->in + first, r * w->in + last, to);
        else if (w->kind >= Q4_0) gguf_row(w, r, first, last, to);
        else int8(w, r, first, last, to);
    }
}

void stored_fetch(const Stored *w, int64_t row, int64_t first, int64_t last) {
    const char *codes = w->codes;
    if (w->kind == GPTQ) {
        for (int64_t c = first; c < last; c += 8) _mm_prefetch(codes + (c / 8 * w->out + row) * 4, _MM_HINT_T0);
        return;
    }
    int64_t size = 1, bytes = 1; /* numbers and bytes of the smallest unit */
    if (w->kind == DENSE) bytes = 2;
    else if (w->kind == NF4) size = 2;
    else if (w->kind >= Q4_0) size = gguf_block(w->kind, &bytes);
    for (int64_t r = row; r < row + LANES; r++) {
        const char *from = codes + (r * w->in + first) / size * bytes, *to = codes + (r * w->in + last + size - 1) / size * bytes;
        for (from -= (uintptr_t)from % LINE; from < to; from += LINE) _mm_prefetch(from, _MM_HINT_T0);
    }
}

void stored_unpack(const Stored *w, bf16 *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < w->out; row += LANES) stored_part(w, row, 0, w->in, to + row * w->in, w->in);
}
