/* Products of a few tokens with frozen weights (panels.c). */
#ifndef LORAKEET_PANELS_H
#define LORAKEET_PANELS_H

#include "lanes.h"

typedef struct {
    const uint32_t *weight;  /* (panels, width/2, 16) words */
    const bf16 *bias;        /* (outputs,); NULL for none */
    int64_t outputs, column; /* number of outputs, and their first column in y */
} Product;

/* x (tokens, width) times each weight, written to its columns of y (tokens, columns). `width` is even. */
void linear(const bf16 *x, const Product *products, int64_t count, bf16 *y, int64_t tokens, int64_t width, int64_t columns,
            int threads);

#endif
