/* Products with a frozen weight (dense.c). */
#ifndef LORAKEET_DENSE_H
#define LORAKEET_DENSE_H

#include "stored.h"

/* Bytes of scratch, which begin at a multiple of 64. */
int64_t dense_scratch(int64_t depth, int64_t width, int threads);

/* Columns of h that are multiplied with what is laid out for them, and added to some rows of a layer's y. */
typedef struct {
    int64_t layer, start, stop; /* the rows start … stop − 1 */
    int64_t columns, words;     /* of h from row to row, and of two neighbours that are multiplied */
    const bf16 *h;              /* that of the first row */
    bf16 *laid;                 /* for each sixteen columns of y the words, one of each column */
} Wide;

/* What a layer's y gets besides, when it has been rounded: a bias, or none, with which it is rounded again, and, of `count`, those that
   are its own. No row may be in two of these. */
typedef struct {
    const bf16 *bias;
    const Wide *wide;
    int64_t count, layer;
} Added;

/* y (tokens, ·) = x·Wᵀ, or, `across`, x·W, or that added to y, and what is `added`, or nothing, while the sums are in registers. */
void stored_product(const bf16 *x, const Stored *weight, bf16 *y, uint8_t *scratch, int64_t tokens, int across, int add,
                    const Added *added, int threads);

void dense_product(const bf16 *x, const bf16 *weight, bf16 *y, uint8_t *scratch, int64_t tokens, int64_t depth, int64_t width,
                   int across, int add, int threads);

#endif
