/* Causal attention of packed rows, forward and backward, in bf16 products with sums in fp32 (FlashAttention-2, Dao 2023).

   A row's queries and keys are processed in tiles of T; scores exist for one tile at a time. Scores are transposed, rows are keys
   and lanes are queries, so that a softmax needs no sums across lanes.

   With Sᵀ = s·K·Qᵀ, P = exp(S − L), L the log of each query's sum, and D = rowsum(∂O ∘ O):

       ∂V = Pᵀ·∂O      ∂Pᵀ = V·∂Oᵀ      ∂Sᵀ = Pᵀ ∘ (∂Pᵀ − D)      ∂K = s·∂Sᵀ·Q      ∂Q = s·∂S·K

   The work is split by heads and by groups of rows. Few parts are halved again, into the later and the (cheaper) earlier queries of
   their rows. Each part sums ∂K and ∂V in memory of its own, the later queries first; the sums are then added in a fixed order, so
   that the result does not depend on the number of threads. */

#include "attention.h"
#include "tiles.h"

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#define FEW_PARTS 16 /* below so many parts each is halved, to balance the threads */
#define SPINS 1000   /* of a waiting thread before it yields its core */

static inline int64_t whole(int64_t count) { return (count + T - 1) / T * T; }

/* Copies `count` tokens of one head, from `first`, to contiguous rows (·, d). */
static void gather(const bf16 *x, int64_t first, int64_t count, int64_t step, int64_t d, bf16 *out) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < d; c += 2 * LANES)
            _mm512_storeu_si512(out + i * d + c, _mm512_loadu_si512(x + (first + i) * step + c));
}

/* The keys that the first `own` tokens of a row see, the prefix first, padded with zeros to whole tiles. */
static void keys_of(const Shape *s, const bf16 *x, int64_t head, int64_t row, int64_t own, bf16 *out) {
    int64_t step = s->kv * s->d, shared = row ? s->prefix : 0, count = shared + own;
    const bf16 *from = x + head * s->d;
    gather(from, 0, shared, step, s->d, out);
    gather(from, s->starts[row], own, step, s->d, out + shared * s->d);
    memset(out + count * s->d, 0, (whole(count) - count) * s->d * sizeof(bf16));
}

/* Copies a tile of queries (T, d), padded with zeros; returns how many are real. */
static int64_t tile_of(const bf16 *x, int64_t first, int64_t left, int64_t step, int64_t d, bf16 *out) {
    int64_t count = left < T ? left : T;
    gather(x, first, count, step, d, out);
    memset(out + count * d, 0, (T - count) * d * sizeof(bf16));
    return count;
}

typedef struct { char *at; } Workspace;
static void *take(Workspace *space, int64_t bytes) {
    void *found = space->at;
    space->at += (bytes + 63) / 64 * 64;
    return found;
}

static int64_t longest(const Shape *s) {
    int64_t most = 0;
    for (int64_t r = 0; r < s->rows; r++) {
        int64_t count = s->lengths[r] + (r ? s->prefix : 0);
        if (count > most) most = count;
    }
    return whole(most);
}

/* Bytes of scratch that each thread works in. */
int64_t attention_scratch(int64_t longest_row, int64_t d) {
    int64_t keys = whole(longest_row);
    return 3 * keys * d * 2 + 6 * T * d * 4 + 5 * T * T * 4 + 8 * T * 4 + 64 * 32;
}

int64_t attention_workspace(const Shape *s) { return attention_scratch(longest(s), s->d); }

/* About twice the number of scores of a row and a head. */
static int64_t scores_in(const Shape *s, int64_t row) {
    return s->lengths[row] * (2 * (row ? s->prefix : 0) + s->lengths[row]);
}

/* The first row of a group; groups have about equally many scores. */
static int64_t first_of(const Shape *s, int64_t group) {
    if (group >= s->groups) return s->rows;
    int64_t all = 0, before = 0, row = 0;
    for (int64_t r = 0; r < s->rows; r++) all += scores_in(s, r);
    while (row < s->rows && before * s->groups < all * group) before += scores_in(s, row++);
    return row;
}

/* Queries of a row, `from` … `stop` − 1. */
typedef struct {
    int64_t from, stop;
} Queries;

/* The queries of a row of `n` that a part covers: with 2 `halves` the later or the earlier ones, else all. */
static Queries queries_of(int64_t n, int halves, int earlier) {
    int64_t middle = whole(n) / T / 2 * T;
    if (halves == 1) return (Queries){0, n};
    return earlier ? (Queries){0, middle} : (Queries){middle, n};
}

static int halves_of(int64_t parts) { return parts < FEW_PARTS ? 2 : 1; }

/* Stores the lower sixteen for a key, the upper sixteen for the next. */
static inline void put_two(bf16 *to, __m512i x) {
    _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(x));
    _mm256_storeu_si256((__m256i *)(to + T), _mm512_extracti64x4_epi64(x, 1));
}

/* P of a tile, two keys of a query in one word; updates each query's highest score and sum of P, and gives the factor for its earlier
   sums. A tile that is not `cut` has no key after its first query. */
static inline __attribute__((always_inline)) void softmax_of(const Seen *seen, const int cut, const float *scores, __m512 factor,
                                                             __m512 *highest, __m512 *total, uint32_t *weights, float *shrink) {
    for (int l = 0; l < seen->sixteens; l++) {
        __m512 most = _mm512_set1_ps(-INFINITY), other = most;
        int64_t keys = cut ? seen->keys[l] : T;
        const float *at = scores + l * LANES;
        for (int64_t c = 0; c < keys; c += 2) {
            __m512 x = _mm512_loadu_ps(at + c * T), y = _mm512_loadu_ps(at + (c + 1) * T);
            most = cut ? _mm512_mask_max_ps(most, sees(c, seen->last + l * LANES), most, x) : _mm512_max_ps(most, x);
            other = cut ? _mm512_mask_max_ps(other, sees(c + 1, seen->last + l * LANES), other, y) : _mm512_max_ps(other, y);
        }
        most = _mm512_max_ps(most, other);
        __m512 high = _mm512_max_ps(highest[l], _mm512_mul_ps(most, factor));
        __m512 less = exp2_of(_mm512_sub_ps(highest[l], high)), added = _mm512_setzero_ps();
        uint32_t *to = weights + l * LANES;
#pragma GCC unroll 4
        for (int64_t c = 0; c < keys; c += 2) {
            __m512 one = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(at + c * T), factor, high));
            __m512 two = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(at + (c + 1) * T), factor, high));
            if (cut) {
                one = _mm512_maskz_mov_ps(sees(c, seen->last + l * LANES), one);
                two = _mm512_maskz_mov_ps(sees(c + 1, seen->last + l * LANES), two);
            }
            added = _mm512_add_ps(added, _mm512_add_ps(one, two));
            _mm512_storeu_si512(to + c / 2 * T, interleaved(narrow_two(one, two)));
        }
        total[l] = _mm512_fmadd_ps(total[l], less, added);
        highest[l] = high;
        _mm512_storeu_ps(shrink + l * LANES, less);
    }
}

static void forward_row(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *logsums, int64_t head,
                        int64_t row, Queries of, Workspace space) {
    int64_t d = s->d, step = s->heads * d, kv = head / (s->heads / s->kv), shared = row ? s->prefix : 0;
    int64_t most = whole(shared + of.stop);
    bf16 *keys = take(&space, most * d * 2), *plain = take(&space, most * d * 2);
    uint32_t *values = take(&space, most * d * 2);
    bf16 *tile = take(&space, T * d * 2);
    uint32_t *queries = take(&space, T * d * 2), *weights = take(&space, T * T * 2);
    float *scores = take(&space, T * T * 4), *sum = take(&space, T * d * 4), *shrink = take(&space, T * 4);
    if (of.from == of.stop) return;
    keys_of(s, k, kv, row, of.stop, keys);
    keys_of(s, v, kv, row, of.stop, plain);
    pairs_of_rows(plain, most, d, values);
    __m512 factor = _mm512_set1_ps(s->scale * LOG2E);
    for (int64_t i = of.from; i < of.stop; i += T) {
        int64_t count = tile_of(q + head * d, s->starts[row] + i, of.stop - i, step, d, tile);
        transposed_words(tile, d, queries);
        __m512 highest[SIXTEENS], total[SIXTEENS];
        for (int l = 0; l < SIXTEENS; l++) highest[l] = _mm512_set1_ps(-INFINITY), total[l] = _mm512_setzero_ps();
        for (int64_t j = 0; j < shared + i + count; j += T) {
            Seen seen = seen_of(shared + i - j, count);
            scores_of(&seen, keys + j * d, queries, scores, d);
            if (seen.last < T - 1) softmax_of(&seen, 1, scores, factor, highest, total, weights, shrink);
            else softmax_of(&seen, 0, scores, factor, highest, total, weights, shrink);
            by_queries(&seen, weights, values + j / 2 * d, sum, d, j ? SCALED : ANEW, shrink);
        }
        float highs[T], totals[T];
        for (int l = 0; l < SIXTEENS; l++) {
            _mm512_storeu_ps(shrink + l * LANES, _mm512_div_ps(_mm512_set1_ps(1.0f), total[l]));
            _mm512_storeu_ps(highs + l * LANES, highest[l]);
            _mm512_storeu_ps(totals + l * LANES, total[l]);
        }
        for (int64_t r = 0; r < count; r++) {
            int64_t token = s->starts[row] + i + r;
            __m512 by = _mm512_set1_ps(shrink[r]);
            for (int64_t c = 0; c < d; c += LANES)
                put(out + token * step + head * d + c, _mm512_mul_ps(_mm512_loadu_ps(sum + r * d + c), by));
            logsums[head * s->tokens + token] = highs[r] + log2f(totals[r]);
        }
    }
}

/* P and ∂S of a tile, and ∂S also as words of two keys of a query. */
static inline __attribute__((always_inline)) void slopes_of(const Seen *seen, const int cut, const float *scores, const float *onto,
                                                            __m512 factor, const float *log_of, const float *share, bf16 *weights,
                                                            bf16 *slopes, uint32_t *slope_pairs) {
    for (int l = 0; l < seen->sixteens; l++) {
        __m512 logs = _mm512_loadu_ps(log_of + l * LANES), shares = _mm512_loadu_ps(share + l * LANES);
        int64_t keys = cut ? seen->keys[l] : T;
#pragma GCC unroll 2
        for (int64_t c = 0; c < keys; c += 2) {
            int64_t at = c * T + l * LANES;
            __m512 p[2], ds[2];
#pragma GCC unroll 2
            for (int64_t e = 0; e < 2; e++) {
                p[e] = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at + e * T), factor, logs));
                if (cut) p[e] = _mm512_maskz_mov_ps(sees(c + e, seen->last + l * LANES), p[e]);
                ds[e] = _mm512_mul_ps(p[e], _mm512_sub_ps(_mm512_loadu_ps(onto + at + e * T), shares));
            }
            __m512i weight = narrow_two(p[0], p[1]), slope = narrow_two(ds[0], ds[1]);
            put_two(weights + at, weight);
            put_two(slopes + at, slope);
            _mm512_storeu_si512(slope_pairs + c / 2 * T + l * LANES, interleaved(slope));
        }
    }
}

static void backward_row(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *logsums,
                         const bf16 *grad, bf16 *grad_q, float *own_k, float *own_v, float *of_prefix_k, float *of_prefix_v,
                         int64_t part_of_heads, int64_t row, Queries of, Workspace space) {
    int64_t d = s->d, step = s->heads * d, together = s->heads / s->parts, shared = row ? s->prefix : 0;
    int64_t most = whole(shared + of.stop), kv = part_of_heads * s->kv / s->parts;
    bf16 *keys = take(&space, most * d * 2), *values = take(&space, most * d * 2), *tile = take(&space, T * d * 2);
    uint32_t *key_pairs = take(&space, most * d * 2);
    uint32_t *queries = take(&space, T * d * 2), *query_pairs = take(&space, T * d * 2);
    uint32_t *grads = take(&space, T * d * 2), *grad_pairs = take(&space, T * d * 2);
    bf16 *weights = take(&space, T * T * 2), *slopes = take(&space, T * T * 2);
    uint32_t *slope_pairs = take(&space, T * T * 2);
    float *scores = take(&space, T * T * 4), *onto = take(&space, T * T * 4), *sum = take(&space, T * d * 4);
    float *log_of = take(&space, T * 4), *share = take(&space, T * 4), *part = take(&space, T * d * 4);
    if (of.from == of.stop) return;
    keys_of(s, k, kv, row, of.stop, keys);
    keys_of(s, v, kv, row, of.stop, values);
    pairs_of_rows(keys, most, d, key_pairs);
    __m512 factor = _mm512_set1_ps(s->scale * LOG2E);
    int64_t each = whole(of.stop - of.from);
    for (int64_t query = 0; query < together * each; query += T) { /* tiles of queries, head by head */
        int64_t head = part_of_heads * together + query / each, i = of.from + query % each;
        int64_t first = s->starts[row] + i, count = tile_of(q + head * d, first, of.stop - i, step, d, tile);
        transposed_words(tile, d, queries);
        pairs_of_rows(tile, T, d, query_pairs);
        tile_of(grad + head * d, first, of.stop - i, step, d, tile);
        transposed_words(tile, d, grads);
        pairs_of_rows(tile, T, d, grad_pairs);
        for (int64_t r = 0; r < T; r++) {
            __m512 dot = _mm512_setzero_ps();
            if (r < count)
                for (int64_t c = 0; c < d; c += LANES)
                    dot = _mm512_fmadd_ps(wide(tile + r * d + c), wide(out + (first + r) * step + head * d + c), dot);
            share[r] = _mm512_reduce_add_ps(dot);
            log_of[r] = r < count ? logsums[head * s->tokens + first + r] : INFINITY; /* a padding query: P is 0 */
        }
        for (int64_t j = 0; j < shared + i + count; j += T) {
            Seen seen = seen_of(shared + i - j, count);
            scores_of(&seen, keys + j * d, queries, scores, d);
            scores_of(&seen, values + j * d, grads, onto, d);
            if (seen.last < T - 1) slopes_of(&seen, 1, scores, onto, factor, log_of, share, weights, slopes, slope_pairs);
            else slopes_of(&seen, 0, scores, onto, factor, log_of, share, weights, slopes, slope_pairs);
            by_queries(&seen, slope_pairs, key_pairs + j / 2 * d, sum, d, j ? ADDED : ANEW, 0);
            int inside = j >= shared && j + seen.all <= shared + of.stop; /* of the row's own keys */
            for (int which = 0; which < 2; which++) { /* ∂V, then ∂K, of this tile of keys */
                const bf16 *a = which ? slopes : weights;
                const uint32_t *b = which ? query_pairs : grad_pairs;
                float *of_prefix = which ? of_prefix_k : of_prefix_v, *own = which ? own_k : own_v;
                by_keys(&seen, a, b, inside ? own + (j - shared) * d : part, d, inside ? ADDED : ANEW);
                for (int64_t c = 0; !inside && c < seen.all && j + c < shared + of.stop; c++) {
                    float *to = j + c < shared ? of_prefix + (j + c) * d : own + (j + c - shared) * d;
                    for (int64_t e = 0; e < d; e++) to[e] += part[c * d + e];
                }
            }
        }
        __m512 by = _mm512_set1_ps(s->scale);
        for (int64_t r = 0; r < count; r++)
            for (int64_t c = 0; c < d; c += LANES)
                put(grad_q + (first + r) * step + head * d + c, _mm512_mul_ps(_mm512_loadu_ps(sum + r * d + c), by));
    }
}

void attention_forward(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *logsums, char *scratch,
                       int threads) {
    int64_t space = attention_workspace(s);
    int halves = halves_of(s->rows * s->heads);
#pragma omp parallel for collapse(3) schedule(monotonic : dynamic, 1) num_threads(threads)
    for (int half = 0; half < halves; half++)
        for (int64_t row = 0; row < s->rows; row++)
            for (int64_t head = 0; head < s->heads; head++)
                forward_row(s, q, k, v, out, logsums, head, row, queries_of(s->lengths[row], halves, half),
                            (Workspace){scratch + omp_get_thread_num() * space});
}

/* The first group owns the prefix as part of its first row and sums into `sums`; the other groups sum the prefix into `of_prefix`.
   A part clears its sums just before it adds to them, while they are in the processor's cache. */
void attention_backward(const Shape *s, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *logsums,
                        const bf16 *grad, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, float *sums, float *of_prefix, char *scratch,
                        int threads) {
    int64_t d = s->d, space = attention_workspace(s), all = s->parts * s->tokens * d;
    int64_t apart = s->groups - 1, shared = apart * s->prefix * d, together = s->parts / s->kv;
    int64_t last = s->starts[s->rows - 1] + s->lengths[s->rows - 1]; /* padding follows, with zero gradients */
    int halves = halves_of(s->groups * s->parts);
    atomic_int done[FEW_PARTS] = {0}; /* of the halved parts: the later queries */
#pragma omp parallel for collapse(3) schedule(monotonic : dynamic, 1) num_threads(threads)
    for (int half = 0; half < halves; half++)
        for (int64_t group = 0; group < s->groups; group++)
            for (int64_t part = 0; part < s->parts; part++) {
                /* GNU OpenMP assigns parts in this order, so the awaited part has started. */
                for (int spins = 0; half && !atomic_load(done + group * s->parts + part); spins++)
                    if (spins < SPINS) _mm_pause();
                    else sched_yield();
                float *of[2]; /* where ∂K and ∂V of the prefix are summed */
                for (int which = 0; which < 2; which++) {
                    of[which] = group ? of_prefix + (which * s->parts + part) * shared + (group - 1) * s->prefix * d
                                      : sums + which * all + part * s->tokens * d;
                    if (group && !half) memset(of[which], 0, s->prefix * d * sizeof(float));
                }
                for (int64_t row = first_of(s, group), stop = first_of(s, group + 1); row < stop; row++) {
                    int64_t own = (part * s->tokens + s->starts[row]) * d;
                    for (int which = 0; !half && which < 2; which++)
                        memset(sums + which * all + own, 0, s->lengths[row] * d * sizeof(float));
                    backward_row(s, q, k, v, out, logsums, grad, grad_q, sums + own, sums + all + own, of[0], of[1], part, row,
                                 queries_of(s->lengths[row], halves, half), (Workspace){scratch + omp_get_thread_num() * space});
                }
                if (halves > 1) atomic_store(done + group * s->parts + part, 1);
            }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < s->tokens; token++)
        for (int64_t of = 0; of < s->kv; of++)
            for (int64_t c = 0; c < d; c += LANES)
                for (int which = 0; which < 2; which++) {
                    __m512 total = _mm512_setzero_ps();
                    for (int64_t p = of * together; token < last && p < (of + 1) * together; p++) {
                        total = _mm512_add_ps(total, _mm512_loadu_ps(sums + which * all + (p * s->tokens + token) * d + c));
                        for (int64_t g = 0; token < s->prefix && g < apart; g++) {
                            const float *from = of_prefix + (which * s->parts + p) * shared + (g * s->prefix + token) * d + c;
                            total = _mm512_add_ps(total, _mm512_loadu_ps(from));
                        }
                    }
                    total = _mm512_mul_ps(total, _mm512_set1_ps(which ? 1.0f : s->scale));
                    put((which ? grad_v : grad_k) + (token * s->kv + of) * d + c, total);
                }
}
