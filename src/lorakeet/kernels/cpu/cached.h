/* Attention of new tokens over a cache of keys and values: cached.c. */
#ifndef LORAKEET_CACHED_H
#define LORAKEET_CACHED_H

#include "lanes.h"

typedef struct {
    int64_t heads, kv, d; /* heads of queries and of keys, and the numbers of each, a multiple of 64 */
    float scale;
} Heads;

typedef struct {
    const bf16 *cos, *sin;            /* (count, d): what turns each token's heads */
    const int64_t *slots, *positions; /* of each token: its sequence, and how many tokens stand before it */
    int64_t count, longest, capacity; /* tokens, the most keys that one sees, and the keys that a slot has room for */
} NewTokens;

/* Bytes of scratch that each thread needs. */
int64_t cached_scratch(const Heads *of, int64_t longest);

/* Of `states` (tokens, (heads + 2·kv)·d), queries, keys and values side by side: turns the first two, writes keys and values to their
   places of (slots, kv, capacity, d), and the attention of each token to `out` (tokens, heads·d). */
void cached_attention(const Heads *of, const NewTokens *new, const bf16 *states, bf16 *keys, bf16 *values, bf16 *out,
                      uint8_t *scratch, int threads);

#endif
