/* Products of rows coded in int8 with a weight in int8 (int8_rows.c). */
#ifndef LORAKEET_CODED_H
#define LORAKEET_CODED_H

#include "lanes.h"

#define LOUD 8 /* columns of x at most that are kept in bf16, an even number */

/* How many columns of rows of this width are kept apart, as kernels/cpu/int8_rows.apart_of says where no library is too. */
static inline int64_t coded_apart(int64_t width) { return width / 32 * 2 < LOUD ? width / 32 * 2 : LOUD; }

/* The `count` columns with the largest absolute values of x (tokens, width), the first of equals, and their numbers (tokens, count).
   `peaks` is scratch (width,). */
void loud_columns(const bf16 *x, uint16_t *peaks, int64_t *columns, bf16 *apart, int64_t tokens, int64_t width, int64_t count,
                  int threads);

/* x, or x ∘ by, but for the `columns`, in steps of the largest absolute value of its row / 127: q + 128, and what a step is worth.
   In a row that has a NaN or an infinity a step is worth NaN, and all results of it are. A row whose steps are too small to be
   divided by, below 3e-39, counts as zeros. */
void code_rows(const bf16 *x, const float *by, const int64_t *columns, int64_t count, uint8_t *codes, float *steps, int64_t tokens,
               int64_t width, int threads);

int64_t coded_scratch(int64_t depth);

/* How many threads have work in a product of so many tokens and columns of the result. */
int coded_threads(int64_t tokens, int64_t width, int threads);

/* y (tokens, width) = (steps ∘ (q·Wᵀ) + apart·Wᵀ[columns]) ∘ scale, or, `across`, steps ∘ (q·W), in bf16, of codes (tokens, depth),
   depth a multiple of 16, and W as it is stored. `scratch` has coded_scratch bytes for each thread. */
void coded_product(const uint8_t *codes, const float *steps, const int8_t *weight, const float *scale, const int64_t *columns,
                   const bf16 *apart, int64_t count, bf16 *y, uint8_t *scratch, int64_t tokens, int64_t depth, int64_t width,
                   int across, int threads);

#endif
