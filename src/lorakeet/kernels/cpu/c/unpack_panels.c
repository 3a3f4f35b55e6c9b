/* Packs frozen weights into panels: PANEL columns of the result, two terms of each side by side. Quantised weights are dequantised on the
   way, a few numbers at a time, with the same bits as stored.c: no weight exists in bf16 as a whole. */

#include "unpack_panels.h"

#include "gptq.h"

#define AHEAD 128 /* numbers of a row to prefetch */
#define PART 1024 /* columns of sixteen rows that are dequantised at once, at most */
#define APART 32  /* padding between such rows, which would otherwise share few sets of the L1 cache */
#define STRIDE (PART + APART)

/* Packs `terms` (even) numbers of sixteen rows of bf16, `stride` apart, as columns of x·Wᵀ. */
static void pack_dense_rows(const bf16 *rows, int64_t stride, int64_t terms, __m512i *panel) {
    for (int64_t c = 0; c < terms; c += 2 * LANES) {
        int64_t pairs = terms - c < 2 * LANES ? (terms - c) / 2 : LANES;
        __m512i words[LANES];
        for (int64_t l = 0; l < LANES; l++) {
            words[l] = _mm512_maskz_loadu_epi32((__mmask16)((1u << pairs) - 1), rows + l * stride + c);
            if (c + AHEAD < terms) _mm_prefetch((const char *)(rows + l * stride + c + AHEAD), _MM_HINT_T0);
        }
        transposed(words);
        for (int64_t k = 0; k < pairs; k++) panel[(c / 2 + k) * WIDE] = words[k];
    }
}

static void pack_gptq_rows(const Stored *weight, int64_t row, int64_t from, int64_t to, __m512i *panel) {
    Grid grid = NO_GRID;
    for (int64_t c = from; c < to; c += 2, panel += WIDE) {
        __m512 one = gptq_column(weight, row, c, &grid), two = gptq_column(weight, row, c + 1, &grid);
        *panel = interleaved(narrow_two(one, two));
        if (c % 8 == 0 && c + AHEAD < to) stored_fetch(weight, row, c + AHEAD, c + AHEAD + 8);
    }
}

void pack_rows(const Stored *weight, int64_t row, int64_t from, int64_t to, int64_t w, __m512i *panel) {
    bf16 part[LANES * STRIDE];
    panel += w;
    if (row >= weight->out)
        for (int64_t k = 0; k < (to - from) / 2; k++) panel[k * WIDE] = _mm512_setzero_si512();
    else if (weight->kind == DENSE)
        pack_dense_rows((const bf16 *)weight->codes + row * weight->in + from, weight->in, to - from, panel);
    else if (weight->kind == GPTQ)
        pack_gptq_rows(weight, row, from, to, panel);
    else
        for (int64_t c = from, stop; c < to; c = stop) {
            stop = c + PART < to ? c + PART : to;
            stored_part(weight, row, c, stop, part, STRIDE);
            pack_dense_rows(part, STRIDE, stop - c, panel + (c - from) / 2 * WIDE);
        }
}

/* Transposes words of two rows: sixteen columns of sixteen rows. */
static inline void words_transposed(__m512i words[8], __m512i *panel) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    __m512i fours[8]; /* words of four columns */
    fours_transposed(words, fours);
    fours_transposed(words + 4, fours + 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        panel[i * WIDE] = _mm512_permutex2var_epi64(fours[i], first, fours[4 + i]);
        panel[(4 + i) * WIDE] = _mm512_permutex2var_epi64(fours[i], second, fours[4 + i]);
    }
}

/* Packs sixteen columns of sixteen rows of a GPTQ weight. */
static void pack_gptq_sixteen(const Stored *weight, int64_t row, int64_t column, __m512i *panel, Grid *grid) {
    __m512i words[8];
    __m512 columns[LANES];
    for (int64_t c = 0; c < LANES; c++) columns[c] = gptq_column(weight, row, column + c, grid);
    for (int64_t c = 0; c < 8; c++) words[c] = narrow_two(columns[c], columns[8 + c]);
    words_transposed(words, panel);
}

/* The same for bf16 rows, `stride` apart. */
static inline void pack_dense_sixteen(const bf16 *rows, int64_t stride, __m512i *panel) {
    for (int64_t r = 0; r < LANES; r += 2) {
        __m512i one = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(rows + r * stride)));
        __m512i two = _mm512_inserti64x4(one, _mm256_loadu_si256((const __m256i *)(rows + (r + 1) * stride)), 1);
        panel[r / 2 * WIDE] = interleaved(two);
    }
}

/* Address of the n-th sixteen columns of panels. */
static inline __m512i *sixteen_of(__m512i *panels, int64_t n, int64_t size) { return panels + n / WIDE * size + n % WIDE; }

/* Packs columns of bf16 in sixteens, from the n-th. */
static void pack_dense_columns(const bf16 *rows, int64_t stride, int64_t columns, int64_t n, int64_t size, __m512i *panels) {
    for (int64_t c = 0; c < columns; c += LANES, n++) pack_dense_sixteen(rows + c, stride, sixteen_of(panels, n, size));
}

void pack_columns(const Stored *weight, int64_t row, int64_t first, int64_t count, int64_t size, __m512i *panels) {
    int64_t there = weight->in - first < count * PANEL ? weight->in - first : count * PANEL;
    if (row + LANES < weight->out) stored_fetch(weight, row + LANES, first, first + there);
    if (weight->kind == DENSE) {
        const bf16 *rows = (const bf16 *)weight->codes + row * weight->in + first;
        pack_dense_columns(rows, weight->in, there, 0, size, panels);
    } else if (weight->kind == GPTQ) {
        Grid grid = NO_GRID;
        for (int64_t c = 0; c < there; c += LANES)
            pack_gptq_sixteen(weight, row, first + c, sixteen_of(panels, c / LANES, size), &grid);
    } else {
        bf16 part[LANES * STRIDE];
        for (int64_t c = 0; c < there; c += PART) {
            int64_t columns = c + PART < there ? PART : there - c;
            stored_part(weight, row, first + c, first + c + columns, part, columns + APART);
            pack_dense_columns(part, columns + APART, columns, c / LANES, size, panels);
        }
    }
    for (int64_t n = there / LANES; n < count * WIDE; n++)
        for (int64_t k = 0; k < LANES / 2; k++) sixteen_of(panels, n, size)[k * WIDE] = _mm512_setzero_si512();
}
