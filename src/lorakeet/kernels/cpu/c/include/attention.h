/* Causal attention of packed (varlen) rows (attention.c). */
#ifndef LORAKEET_ATTENTION_H
#define LORAKEET_ATTENTION_H

#include "lanes.h"

typedef struct {
    const int64_t *starts, *lengths; /* of each row: its first token, and its own tokens without a shared prefix */
    int64_t rows, prefix;            /* tokens of the shared prefix, which count as the first row's own */
    int64_t tokens, heads, kv, d;
    int64_t parts, groups;           /* how the backward pass splits heads (at least one part for each key head) and rows */
    float scale;
} Shape;

/* Bytes of scratch that each thread works in. */
int64_t attention_scratch(int64_t longest_row, int64_t d);
int64_t attention_workspace(const Shape *s);

void attention_forward(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *logsums, char *scratch,
                       int threads);

/* Workspace for ∂K and ∂V: `sums` (2, parts, tokens, d), `of_prefix` (2, parts, groups − 1, prefix, d). */
void attention_backward(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *logsums,
                        const bf16 *grad, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, float *sums, float *of_prefix, char *scratch,
                        int threads);

#endif
