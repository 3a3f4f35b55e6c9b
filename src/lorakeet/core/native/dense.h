/* Products with a frozen weight (dense.c). */
#ifndef LORAKEET_DENSE_H
#define LORAKEET_DENSE_H

#include "lanes.h"

/* Bytes of scratch, which begin at a multiple of 64. */
int64_t dense_scratch(int64_t depth, int64_t width, int threads);

void dense_product(const bf16 *x, const bf16 *weight, bf16 *y, uint8_t *scratch, int64_t tokens, int64_t depth, int64_t width,
                   int across, int add, int threads);

#endif
