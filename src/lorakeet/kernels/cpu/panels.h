/* Products of a few tokens with frozen weights: panels.c. */
#ifndef LORAKEET_LINEAR_H
#define LORAKEET_LINEAR_H

#include "lanes.h"

typedef struct {
    const uint32_t *weight;  /* (panels, width/2, 16) words */
    const bf16 *bias;        /* of each output; NULL for none */
    int64_t outputs, column; /* how many, and the column of y that they begin at */
} Product;

/* x (tokens, width) times each of the weights, to their columns of y (tokens, columns). `width` is even. */
void linear(const bf16 *x, const Product *products, int64_t count, bf16 *y, int64_t tokens, int64_t width, int64_t columns,
            int threads);

#endif
