/* Products with a frozen weight (dense.c). */
#ifndef LORAKEET_DENSE_H
#define LORAKEET_DENSE_H

#include "stored.h"

/* Bytes of workspace, aligned to 64. */
int64_t dense_scratch(int64_t depth, int64_t width, int threads);

/* Columns of h, multiplied with a packed B (or A) and added to some rows of a layer's y. */
typedef struct {
    int64_t layer, start, stop; /* the rows start … stop − 1 */
    int64_t columns, words;     /* stride of h's rows, and how many words of two neighbours are multiplied */
    const bf16 *h;              /* of the first row */
    bf16 *packed;                 /* for each sixteen columns of y their words, one of each column */
} Wide;

/* What is added to a layer's rounded y: a bias (or none), after which it is rounded again, and those of the `count` Wides that have
   this layer. No row may be in two of them. */
typedef struct {
    const bf16 *bias;
    const Wide *wide;
    int64_t count, layer;
} Added;

/* y (tokens, ·) = x·Wᵀ, or x·W if `across`; with `add`, added to y. `added` (may be null) is added while the sums are in registers. */
void stored_product(const bf16 *x, const Stored *weight, bf16 *y, uint8_t *scratch, int64_t tokens, int across, int add,
                    const Added *added, int threads);

void dense_product(const bf16 *x, const bf16 *weight, bf16 *y, uint8_t *scratch, int64_t tokens, int64_t depth, int64_t width,
                   int across, int add, int threads);

#endif
