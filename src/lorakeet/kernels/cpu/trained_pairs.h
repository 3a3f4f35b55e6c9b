/* Low-rank products of pairs in training (trained_pairs.c). */
#ifndef LORAKEET_TRAINED_PAIRS_H
#define LORAKEET_TRAINED_PAIRS_H

#include "dense.h"

/* As kernels/cpu/trained_pairs lays it out, in whole numbers of 64 bits. */
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

/* Adds what is `added` to the rows `token` … `end` − 1 of y (·, width). */
void add_to_rows(const Added *added, bf16 *y, int64_t width, int64_t token, int64_t end);

/* `trained_pairs` and `trained_pairs_backward` without what they add to y and to ∂x, which is told in `wide`: forward for each pair,
   backward for each part, whose number is given back, or for none where `wide` is none. It points into h, or u, and scratch. */
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
