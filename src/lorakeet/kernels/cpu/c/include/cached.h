/* Attention of new tokens over a cache of keys and values: cached.c. */
#ifndef LORAKEET_CACHED_H
#define LORAKEET_CACHED_H

#include "lanes.h"

typedef struct {
    int64_t heads, kv, d; /* heads of queries and of keys, and the numbers of each, a multiple of 64 */
    float scale;
} Heads;

typedef struct {
    const bf16 *cos, *sin;            /* (count, d): the rotation of each token's heads */
    const int64_t *slots, *positions; /* of each token: its slot in the cache, and its position in the sequence */
    int64_t count, longest, capacity; /* new tokens, the most keys that one of them attends to, keys that a slot can store */
} NewTokens;

/* Bytes of scratch that each thread needs. */
int64_t cached_scratch(const Heads *of, int64_t longest);

/* Takes queries, keys and values side by side in `states` (tokens, (heads + 2·kv)·d). Rotates queries and keys, writes keys and values
   into the cache (slots, kv, capacity, d), and the attention of each token to `out` (tokens, heads·d). */
void cached_attention(const Heads *of, const NewTokens *new, const bf16 *states, bf16 *keys, bf16 *values, bf16 *out,
                      uint8_t *scratch, int threads);

#endif
