/* Low-rank pairs of adapters added to the outputs of layers, for inference (pairs.c). */
#ifndef LORAKEET_PAIRS_H
#define LORAKEET_PAIRS_H

#include "lanes.h"

typedef struct {
    const bf16 *at; /* start of a layer's copy */
    int64_t rank;   /* even; 0 without a pair */
} Copy;

typedef struct {
    const int64_t *tokens;
    int64_t count;
    const Copy *copies; /* by the layer's number */
} Share;

typedef struct {
    int64_t number, outputs;
    bf16 *y; /* (tokens, outputs) */
    int64_t stride;
} Layer;

/* Adds x·Aᵀ·Bᵀ to the y of each layer, all with the same input x (tokens, width), for the tokens of each share. Shares do not overlap. */
void add_pairs(const Share *shares, int64_t count, const Layer *layers, int64_t layer_count, const bf16 *x, int64_t stride,
               int64_t width, int threads);

#endif
