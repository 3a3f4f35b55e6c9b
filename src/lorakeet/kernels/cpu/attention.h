/* Causal attention of rows laid end to end (attention.c). */
#ifndef LORAKEET_ATTENTION_H
#define LORAKEET_ATTENTION_H

#include "lanes.h"

typedef struct {
    const int64_t *starts, *lengths; /* of each row: its first token, and how many are its own */
    int64_t rows, prefix;            /* tokens that stand before all rows but the first, which has them as its own */
    int64_t tokens, heads, kv, d;
    int64_t parts, groups;           /* of the heads, at least one for each key head, and of the rows: of the work backward */
    float scale;
} Shape;

/* Bytes of scratch that each thread works in. */
int64_t attention_scratch(int64_t longest_row, int64_t d);
int64_t attention_room(const Shape *s);

void attention_forward(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *logsums, char *scratch,
                       int threads);

/* `sums`: room for (2, parts, tokens, d), and `of_prefix` for (2, parts, groups − 1, prefix, d), of ∂K and ∂V. */
void attention_backward(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *logsums,
                        const bf16 *grad, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, float *sums, float *of_prefix, char *scratch,
                        int threads);

#endif
