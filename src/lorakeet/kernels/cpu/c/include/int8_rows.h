/* Products of rows quantised to int8 with a weight in int8 (int8_rows.c). */
#ifndef LORAKEET_INT8_ROWS_H
#define LORAKEET_INT8_ROWS_H

#include "lanes.h"

#define OUTLIERS 8 /* most outlier columns of x that stay in bf16; even */

/* How many outlier columns rows of this width have; the same as kernels/cpu/int8_rows.outliers_of. */
static inline int64_t int8_outliers(int64_t width) { return width / 32 * 2 < OUTLIERS ? width / 32 * 2 : OUTLIERS; }

/* Finds the `count` columns of x (tokens, width) with the largest absolute values, the first of equals, and copies them to `apart`
   (tokens, count). `peaks` (width,) is workspace. */
void outlier_columns(const bf16 *x, uint16_t *peaks, int64_t *columns, bf16 *apart, int64_t tokens, int64_t width, int64_t count,
                  int threads);

/* Quantises x, or x ∘ by, without the outlier `columns`, to codes q + 128 with one step for each row: its largest absolute value / 127.
   A row with a NaN or an infinity has the step NaN, and so have all its results. A row whose step is too small to divide by, below
   3e-39, counts as zeros. */
void quantise_rows(const bf16 *x, const float *by, const int64_t *columns, int64_t count, uint8_t *codes, float *steps, int64_t tokens,
               int64_t width, int threads);

int64_t int8_scratch(int64_t depth);

/* How many threads have work in a product with so many tokens and columns. */
int int8_threads(int64_t tokens, int64_t width, int threads);

/* y (tokens, width) = (steps ∘ (q·Wᵀ) + apart·Wᵀ[columns]) ∘ scale, or steps ∘ (q·W) if `across`, in bf16. Codes are (tokens, depth),
   depth a multiple of 16; W is read as it is stored. `scratch` has int8_scratch bytes for each thread. */
void int8_product(const uint8_t *codes, const float *steps, const int8_t *weight, const float *scale, const int64_t *columns,
                   const bf16 *apart, int64_t count, bf16 *y, uint8_t *scratch, int64_t tokens, int64_t depth, int64_t width,
                   int across, int threads);

#endif
