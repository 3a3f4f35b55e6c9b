/* Low-rank products of pairs in training (trained_pairs.c). */
#ifndef LORAKEET_TRAINED_PAIRS_H
#define LORAKEET_TRAINED_PAIRS_H

#include "dense.h"

/* Laid out as in kernels/cpu/trained_pairs: 64-bit integers. */
typedef struct {
    const void *A, *B; /* (rank, width), (outputs, rank) */
    int64_t kind_a, kind_b, rank, start, stop;
    int64_t layer;   /* index of its y, or g */
    int64_t from;    /* start of the part's h */
    int64_t columns; /* columns of the part's h */
    int64_t column;  /* the pair's first column */
} Pair;

typedef struct {
    bf16 *rows; /* y or g: (tokens, outputs) */
    int64_t outputs;
} Layer;

/* Adds `added` to the rows `token` … `end` − 1 of y (·, width). */
void add_to_rows(const Added *added, bf16 *y, int64_t width, int64_t token, int64_t end);

/* `trained_pairs` and `trained_pairs_backward` without adding to y and to ∂x: what is to be added is described in `wide`, one for each
   pair (forward) or for each part (backward, which returns their number), unless `wide` is null. They point into h, or u, and scratch. */
void trained_pairs_shrink(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, const bf16 *x, int64_t width,
                          bf16 *h, bf16 *scratch, Wide *wide, int threads);
int64_t trained_pairs_shrink_back(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, int64_t width,
                                  const bf16 *h, bf16 *u, float *of_b, bf16 *scratch, Wide *wide, int threads);

void trained_pairs(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, const bf16 *x, int64_t width,
                   bf16 *h, bf16 *scratch, int threads);

void trained_pairs_backward(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, bf16 *grad_x, int64_t width,
                            const bf16 *h, bf16 *u, float *of_b, bf16 *scratch, int threads);

void trained_pairs_of_a(const Pair *pairs, int64_t count, const bf16 *u, const bf16 *x, int64_t width, float *of_a, bf16 *scratch,
                        int threads);

#endif
