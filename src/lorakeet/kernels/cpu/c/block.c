/* A whole decoder block over new tokens: two norms, attention over a KV cache, a gated MLP; each token with its own pairs. */

#include "cached.h"
#include "panels.h"
#include "pairs.h"
#include "elementwise.h"

#include <string.h>

enum { Q, K, V, O, GATE, UP, DOWN, LAYERS };

typedef struct {
    Product qkv[3], o, gate_up[2], down; /* the layers by shared input */
    const bf16 *norms[2];
    float epsilons[2];
    int64_t hidden, inner; /* the widths of x and of the MLP, multiples of 16 */
    Heads heads;
} Block;

typedef struct {
    const Share *shares;
    int64_t count;
    int64_t numbers[LAYERS]; /* of the layers, in the copies; −1 for layers without pairs */
} Pairs;

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Numbers of each token in the two buffers that hold intermediate results. */
static int64_t first_width(const Block *of) {
    return larger(of->hidden, larger((of->heads.heads + 2 * of->heads.kv) * of->heads.d, 2 * of->inner));
}

static int64_t second_width(const Block *of) { return larger(larger(of->hidden, of->heads.heads * of->heads.d), of->inner); }

int64_t block_scratch(const Block *of, int64_t tokens, int64_t longest, int threads) {
    int64_t states = tokens * ((first_width(of) + second_width(of)) * (int64_t)sizeof(bf16) + (int64_t)sizeof(float));
    return threads * cached_scratch(&of->heads, longest) + (states + 63) / 64 * 64;
}

/* y = a + b of `count` numbers, a multiple of 16. */
static void add(const bf16 *a, const bf16 *b, bf16 *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) put(y + i, _mm512_add_ps(wide(a + i), wide(b + i)));
}

/* Adds the pairs of `count` layers from `first` to y (tokens, columns), for inputs x (tokens, width). */
static void adapt(const Pairs *pairs, int first, const Product *products, int count, const bf16 *x, int64_t width, bf16 *y,
                  int64_t columns, int threads) {
    Layer layers[LAYERS];
    int64_t found = 0;
    for (int i = 0; i < count; i++)
        if (pairs->numbers[first + i] >= 0)
            layers[found++] = (Layer){pairs->numbers[first + i], products[i].outputs, y + products[i].column, columns};
    if (found) add_pairs(pairs->shares, pairs->count, layers, found, x, width, width, threads);
}

/* x (tokens, hidden) to y; tokens after the `new` ones attend to nothing. */
void block(const Block *of, const Pairs *pairs, const NewTokens *new, const bf16 *x, bf16 *y, bf16 *keys, bf16 *values,
           int64_t tokens, uint8_t *scratch, int threads) {
    const Heads *heads = &of->heads;
    int64_t hidden = of->hidden, inner = of->inner, q = heads->heads * heads->d, kv = heads->kv * heads->d;
    bf16 *first = (bf16 *)(scratch + threads * cached_scratch(heads, new->longest));
    bf16 *second = first + tokens * first_width(of);
    float *rho = (float *)(second + tokens * second_width(of));
    norm(x, of->norms[0], of->epsilons[0], second, rho, tokens, hidden, threads);
    linear(second, of->qkv, 3, first, tokens, hidden, q + 2 * kv, threads);
    adapt(pairs, Q, of->qkv, 3, second, hidden, first, q + 2 * kv, threads);
    memset(second + new->count * q, 0, (tokens - new->count) * q * sizeof(bf16));
    cached_attention(heads, new, first, keys, values, second, scratch, threads);
    linear(second, &of->o, 1, first, tokens, q, hidden, threads);
    adapt(pairs, O, &of->o, 1, second, q, first, hidden, threads);
    add(x, first, y, tokens * hidden);
    norm(y, of->norms[1], of->epsilons[1], second, rho, tokens, hidden, threads);
    linear(second, of->gate_up, 2, first, tokens, hidden, 2 * inner, threads);
    adapt(pairs, GATE, of->gate_up, 2, second, hidden, first, 2 * inner, threads);
    gated_apart(first, first + inner, second, tokens, inner, 2 * inner, threads);
    linear(second, &of->down, 1, first, tokens, inner, hidden, threads);
    adapt(pairs, DOWN, &of->down, 1, second, inner, first, hidden, threads);
    add(y, first, y, tokens * hidden);
}
