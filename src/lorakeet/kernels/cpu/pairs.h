/* What pairs of adapters add to the outputs of layers: pairs.c. */
#ifndef LORAKEET_PAIRS_H
#define LORAKEET_PAIRS_H

#include "lanes.h"

typedef struct {
    const bf16 *at; /* where a layer's copy begins */
    int64_t rank;   /* even; 0 where there is none */
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

/* Adds x·Aᵀ·Bᵀ to the y's of layers that see the same x (tokens, width), for the tokens of each share; no token is in two. */
void add_pairs(const Share *shares, int64_t count, const Layer *layers, int64_t layer_count, const bf16 *x, int64_t stride,
               int64_t width, int threads);

#endif
