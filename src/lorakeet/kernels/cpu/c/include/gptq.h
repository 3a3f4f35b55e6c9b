/* Sixteen rows of a column of a GPTQ weight: scales[g, r]·(code[c, r] − zero[g, r]), g the column's group. */
#ifndef LORAKEET_GPTQ_H
#define LORAKEET_GPTQ_H

#include "stored.h"

/* Scale and zero point of a group for sixteen rows, cached from the column before. */
typedef struct {
    int64_t group;
    __m512 scale;
    __m512i zero;
} Grid;

static const Grid NO_GRID = {.group = INT64_MIN};

/* The eight 4-bit fields of each of two words, in order. */
static inline __m512i fields(const uint32_t *words, uint32_t added) {
    const __m512i shifts = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    __m512i two = _mm512_inserti64x4(_mm512_set1_epi32((int)(words[0] + added)), _mm256_set1_epi32((int)(words[1] + added)), 1);
    return _mm512_and_si512(_mm512_srlv_epi32(two, shifts), _mm512_set1_epi32(15));
}

/* Sixteen rows from `row`, a multiple of 16. A group number out of range means the last group. */
static inline __attribute__((always_inline)) __m512 gptq_column(const Stored *w, int64_t row, int64_t column, Grid *grid) {
    const uint32_t *codes = (const uint32_t *)w->codes + column / 8 * w->out + row;
    int64_t group = ((const int32_t *)w->more)[column];
    if (group != grid->group) {
        grid->group = group;
        if ((uint64_t)group >= (uint64_t)w->count) group = w->count - 1;
        grid->zero = fields((const uint32_t *)w->outer + group * (w->out / 8) + row / 8, (uint32_t)w->size);
        grid->scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)w->scales + group * w->out + row)));
    }
    __m512i code = _mm512_and_si512(_mm512_srli_epi32(_mm512_loadu_si512(codes), (unsigned)(column % 8 * 4)), _mm512_set1_epi32(15));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, grid->zero)), grid->scale);
}

#endif
