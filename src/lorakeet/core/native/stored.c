/* Frozen weights brought back from their codes to bf16: the numbers of lorakeet/quant (nf4, gptq, int8, gguf), to the last bit, but
   that results below 1.2e-38 are zeros. */

#include "stored.h"

#define OUTER 256 /* blocks of NF4 that share one outer scale */

/* A product that is rounded before anything is added to it; without this the compiler makes one operation of both. */
static inline float apart(float x) {
    __asm__("" : "+x"(x));
    return x;
}

/* The numbers from `i` on, which begin at a multiple of 16; LEVELS[code]·scale of the block. */
static void nf4(const Stored *w, int64_t first, int64_t last, bf16 *to) {
    const uint8_t *codes = w->codes;
    const __m512 levels = _mm512_loadu_ps(w->levels);
    for (int64_t i = first; i < last;) {
        int64_t block = i / w->size, stop = (block + 1) * w->size < last ? (block + 1) * w->size : last;
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
            put(to + i, _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), levels), by));
        }
    }
}

/* Eight fields of four bits of two words, one behind the other. */
static inline __m512i fields(const uint32_t *words, uint32_t added) {
    const __m512i shifts = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    __m512i two = _mm512_inserti64x4(_mm512_set1_epi32((int)(words[0] + added)), _mm256_set1_epi32((int)(words[1] + added)), 1);
    return _mm512_and_si512(_mm512_srlv_epi32(two, shifts), _mm512_set1_epi32(15));
}

/* Sixteen rows from `row` on: scales[g, r]·(code[c, r] − zero[g, r]), g the column's group, of those that there are. */
static void gptq(const Stored *w, int64_t row, bf16 *to) {
    const uint32_t *codes = (const uint32_t *)w->codes + row, *zeros = (const uint32_t *)w->outer + row / 8;
    const int32_t *groups = w->more;
    __m512 scale = _mm512_setzero_ps();
    __m512i zero = _mm512_setzero_si512();
    int64_t group = -1;
    for (int64_t c = 0; c < w->in; c += LANES) {
        __m512i columns[LANES];
        for (int64_t k = 0; k < LANES; k++) {
            if (groups[c + k] != group) {
                group = (uint32_t)groups[c + k] < (uint64_t)w->count ? groups[c + k] : w->count - 1;
                zero = fields(zeros + group * (w->out / 8), (uint32_t)w->size);
                scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)w->scales + group * w->out + row)));
            }
            __m512i words = _mm512_srli_epi32(_mm512_loadu_si512(codes + (c + k) / 8 * w->out), (unsigned)(k % 8 * 4));
            __m512i off = _mm512_sub_epi32(_mm512_and_si512(words, _mm512_set1_epi32(15)), zero);
            columns[k] = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(off), scale));
        }
        transposed(columns);
        for (int64_t r = 0; r < LANES; r++) put(to + r * w->in + c, _mm512_castsi512_ps(columns[r]));
    }
}

static void int8(const Stored *w, int64_t row, bf16 *to) {
    for (int64_t r = row; r < row + LANES; r++, to += w->in) {
        const int8_t *codes = (const int8_t *)w->codes + r * w->in;
        __m512 by = _mm512_set1_ps(((const float *)w->scales)[r]);
        for (int64_t c = 0; c < w->in; c += LANES) {
            __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + c)));
            put(to + c, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), by));
        }
    }
}

void stored_back(const Stored *w, bf16 *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < w->out; row += LANES) {
        if (w->kind == NF4) nf4(w, row * w->in, (row + LANES) * w->in, to);
        else if (w->kind == GPTQ) gptq(w, row, to + row * w->in);
        else if (w->kind >= Q4_0) gguf_rows(w, row, row + LANES, to);
        else int8(w, row, to + row * w->in);
    }
}

const bf16 *stored_dense(const Stored *w, bf16 *room, int threads) {
    if (w->kind == DENSE) return w->codes;
    stored_back(w, room, threads);
    return room;
}
