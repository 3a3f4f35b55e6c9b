/* Low-rank products of pairs in training (trained_pairs.c). */
#ifndef LORAKEET_TRAINED_PAIRS_H
#define LORAKEET_TRAINED_PAIRS_H

#include "lanes.h"

/* As core/native/trained_pairs lays it out, in whole numbers of 64 bits. */
typedef struct {
    const void *A, *B; /* (rank, width), (outputs, rank) */
    int64_t kind_a, kind_b, rank, start, stop;
    int64_t layer;   /* which y, or g, it belongs to */
    int64_t from;    /* where the part's h begins */
    int64_t columns; /* of the part's h */
    int64_t column;  /* the pair's first one */
} Pair;

typedef struct {
    bf16 *rows; /* y or g: (tokens, outputs) */
    int64_t outputs;
} Layer;

void trained_pairs(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, const bf16 *x, int64_t width,
                   bf16 *h, bf16 *scratch, int threads);

void trained_pairs_backward(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, bf16 *grad_x, int64_t width,
                            const bf16 *h, bf16 *u, float *of_b, bf16 *scratch, int threads);

void trained_pairs_of_a(const Pair *pairs, int64_t count, const bf16 *u, const bf16 *x, int64_t width, float *of_a, bf16 *scratch,
                        int threads);

#endif
