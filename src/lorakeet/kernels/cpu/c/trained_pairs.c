/* Low-rank products of pairs in training, each pair on its own rows: bf16 rows, sums in fp32, A and B in fp32 or bf16.

       y += s·h·Bᵀ, h = x·Aᵀ        u = s·g·B, ∂x += u·A, ∂B = s·gᵀ·h        ∂A = uᵀ·x

   Pairs on the same rows of the same x form a part. Its h and u are (tokens, columns): each pair has `rank` columns, and one of zeros
   more if that is odd. Widths are multiples of 32. A row is summed in a fixed order, whatever the other rows are; ∂A and ∂B in the
   order of the part's tokens.

   VDPBF16PS adds two products at a time to each of sixteen sums. Three kernels do all products:
   - `shrink`: the sums are columns of h. The two numbers are neighbours in a row of x; A is packed so that the same two numbers of
     sixteen rows are side by side. For the last eight columns or fewer it takes four neighbours, and a sum is in two halves.
   - `widen`: the sums are neighbours in a row of y. The two numbers are neighbours in a row of h.
   - `reduce`: the sums are neighbours in a row of ∂A. The two numbers belong to two consecutive tokens. */

#include "trained_pairs.h"

#include <string.h>

#define LINE (2 * LANES) /* numbers of a register */
#define BLOCK 24         /* tokens in a piece of work; even */
#define SHRINK 12        /* tokens whose sums are in registers in `shrink` */
#define WIDEN 12         /* and in `widen` */
#define AHEAD 24         /* tokens to prefetch: each is in its own cache line, often in its own page */
#define REDUCE 8         /* columns of u at once: two registers of sums each, half of all registers */

enum { FP32, BF16 };

/* A part: its pairs first … last − 1, the offset of its packed factors, and its pieces of work. */
typedef struct {
    int64_t first, last, at, pieces;
} Part;

/* Some tokens of a part, and the offset of their h. */
typedef struct {
    const Part *part;
    int64_t token, tokens, to;
} Piece;

static inline int64_t even(int64_t n) { return n + n % 2; }
static inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

/* Up to 32 numbers of a row, as bf16, padded with zeros. */
static inline __m512i line_of(const void *row, int64_t first, int64_t count, int64_t kind, float scale) {
    __m512 low, high;
    __mmask16 few = count < LANES ? (__mmask16)((1u << count) - 1) : 0xffff;
    __mmask16 rest = count < LINE ? (__mmask16)((1u << (count > LANES ? count - LANES : 0)) - 1) : 0xffff;
    if (kind == FP32) {
        low = _mm512_maskz_loadu_ps(few, (const float *)row + first);
        high = _mm512_maskz_loadu_ps(rest, (const float *)row + first + LANES);
    } else {
        low = widened(_mm256_maskz_loadu_epi16(few, (const bf16 *)row + first));
        high = widened(_mm256_maskz_loadu_epi16(rest, (const bf16 *)row + first + LANES));
    }
    __m512 by = _mm512_set1_ps(scale);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, by), _mm512_mul_ps(low, by));
}

static inline const void *row_of(const void *at, int64_t row, int64_t width, int64_t kind) {
    return (const char *)at + row * width * (kind == FP32 ? sizeof(float) : sizeof(bf16));
}

/* Interleaves two rows into words: the first sixteen columns to `to`, the others `apart` numbers later. */
static inline void put_interleaved(__m512i one, __m512i two, bf16 *to, int64_t apart) {
    __m512i low = _mm512_unpacklo_epi16(one, two), high = _mm512_unpackhi_epi16(one, two);
    __m512i first = _mm512_shuffle_i64x2(low, high, 0x44), second = _mm512_shuffle_i64x2(low, high, 0xee);
    __m512i order = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, first));
    _mm512_storeu_si512(to + apart, _mm512_permutexvar_epi64(order, second));
}

/* True if the last `left` columns are summed in two halves. */
static inline int halved(int64_t left) { return left <= LANES / 2; }

/* Stores words w (two neighbours) of columns, the first in `lane`, into the sixteen columns at `to`; if halved, w + 1 too. */
static inline void put_words(bf16 *to, int64_t w, int64_t lane, int64_t count, const __m512i *words, int half) {
    if (!half) {
        __mmask16 some = (__mmask16)(((1u << count) - 1) << (lane < 0 ? 0 : lane));
        __m512i from = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512i moved = _mm512_permutexvar_epi32(_mm512_sub_epi32(from, _mm512_set1_epi32((int)lane)), words[0]);
        _mm512_mask_storeu_epi32(to + 2 * w * LANES, some, moved);
        return;
    }
    __m512i place = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    __mmask16 some = (__mmask16)(((1u << 2 * count) - 1) << (lane < 0 ? 0 : 2 * lane));
    __m512i both_words = _mm512_permutex2var_epi32(words[0], _mm512_sub_epi32(place, _mm512_set1_epi32((int)lane)), words[1]);
    _mm512_mask_storeu_epi32(to + w * LANES, some, both_words);
}

/* Packs rows of `width` numbers as columns of sums, from `column` of `columns`, padded to an even number. Sixteen columns are stored
   together, word by word; in a halved sixteen two words of a column are side by side. */
static void pack_sums(const void *rows, int64_t count, int64_t width, int64_t kind, float scale, bf16 *to, int64_t column,
                     int64_t columns) {
    for (int64_t c = 0; c < width; c += LINE)
        for (int64_t r = 0; r < count; r += LANES) {
            int64_t left = even(count) - r, first = column + r, stop = first + (left < LANES ? left : LANES);
            __m512i words[16];
            for (int64_t i = 0; i < LANES; i++)
                words[i] = r + i < count ? line_of(row_of(rows, r + i, width, kind), c, width - c, kind, scale) : _mm512_setzero_si512();
            transposed(words);
            for (int64_t begin = first / LANES * LANES; begin < stop; begin += LANES) { /* the sixteens that these columns are in */
                int64_t from = first > begin ? first : begin, end = stop < begin + LANES ? stop : begin + LANES;
                int half = halved(columns - begin);
                for (int64_t w = 0; w < LANES; w += 1 + half)
                    put_words(to + begin * width, c / 2 + w, first - begin, end - from, words + w, half);
            }
        }
}

/* Packs columns of (tall, count) rows as columns of sums: `pack_sums` of the transposed matrix. */
static void pack_sums_across(const void *rows, int64_t tall, int64_t count, int64_t kind, float scale, bf16 *to) {
    for (int64_t o = 0; o < tall; o += 4)
        for (int64_t r = 0; r < count; r += LINE) {
            bf16 pairs_of_tokens[2][2 * LINE];
            for (int64_t w = 0; w < 2; w++) {
                __m512i one = line_of(row_of(rows, o + 2 * w, count, kind), r, count - r, kind, scale);
                __m512i two = line_of(row_of(rows, o + 2 * w + 1, count, kind), r, count - r, kind, scale);
                put_interleaved(one, two, pairs_of_tokens[w], LINE);
            }
            for (int64_t begin = r; begin < count && begin < r + LINE; begin += LANES) {
                __m512i words[2] = {_mm512_loadu_si512(pairs_of_tokens[0] + 2 * (begin - r)), _mm512_loadu_si512(pairs_of_tokens[1] + 2 * (begin - r))};
                int half = halved(even(count) - begin);
                for (int64_t w = 0; w < 2; w += 1 + half)
                    put_words(to + begin * tall, o / 2 + w, 0, half ? LANES / 2 : LANES, words + w, half);
            }
        }
}

/* Packs B (outputs, rank) for `widen`: for each sixteen outputs, words of two neighbours in a row of B. */
static void pack_wide(const void *B, int64_t outputs, int64_t rank, int64_t kind, float scale, bf16 *to) {
    int64_t words = even(rank) / 2;
    for (int64_t o = 0; o < outputs; o += LANES)
        for (int64_t r = 0; r < rank; r += LINE) {
            __m512i at[16];
            for (int64_t i = 0; i < LANES; i++) at[i] = line_of(row_of(B, o + i, rank, kind), r, rank - r, kind, scale);
            transposed(at);
            int64_t here = words - r / 2 < LANES ? words - r / 2 : LANES;
            for (int64_t w = 0; w < here; w++) _mm512_storeu_si512(to + 2 * LANES * (o / LANES * words + r / 2 + w), at[w]);
        }
}

/* Packs A (rank, width) for `widen`: for each sixteen columns, words of two rows, from word `first` of `words`. */
static void pack_wide_across(const void *A, int64_t rank, int64_t width, int64_t kind, bf16 *to, int64_t first, int64_t words) {
    for (int64_t r = 0; r < rank; r += 2)
        for (int64_t c = 0; c < width; c += LINE) {
            __m512i one = line_of(row_of(A, r, width, kind), c, width - c, kind, 1.0f), two = _mm512_setzero_si512();
            if (r + 1 < rank) two = line_of(row_of(A, r + 1, width, kind), c, width - c, kind, 1.0f);
            put_interleaved(one, two, to + 2 * LANES * (c / LANES * words + first + r / 2), 2 * LANES * words);
        }
}

/* `shrink` for `count` tokens; `half`: eight columns or fewer, summed in two halves. */
static inline __attribute__((always_inline)) void shrink_some(const bf16 *x, int64_t width, const bf16 *packed, const int half,
                                                              const int count, __mmask16 there, bf16 *h, int64_t columns) {
    __m512 sums[SHRINK];
#pragma GCC unroll 12
    for (int t = 0; t < count; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += half ? 4 : 2, packed += LINE) {
        __m512bh at = both(packed);
#pragma GCC unroll 12
        for (int t = 0; t < count; t++)
            sums[t] = _mm512_dpbf16_ps(sums[t], at, half ? four_of(x + t * width + c) : two_of(x + t * width + c));
    }
#pragma GCC unroll 12
    for (int t = 0; t < count; t++) {
        __m512 other = _mm512_castsi512_ps(_mm512_srli_epi64(_mm512_castps_si512(sums[t]), 32));
        __m512 whole = half ? _mm512_maskz_compress_ps(0x5555, _mm512_add_ps(sums[t], other)) : sums[t];
        _mm256_mask_storeu_epi16(h + t * columns, there, narrow(whole));
    }
}

static inline __attribute__((always_inline)) void shrink_all(const bf16 *x, int64_t tokens, int64_t width, const bf16 *packed,
                                                             const int half, __mmask16 there, bf16 *h, int64_t columns) {
    int64_t t = 0;
    for (; t + SHRINK <= tokens; t += SHRINK) shrink_some(x + t * width, width, packed, half, SHRINK, there, h + t * columns, columns);
    for (; t + 4 <= tokens; t += 4) shrink_some(x + t * width, width, packed, half, 4, there, h + t * columns, columns);
    for (; t < tokens; t++) shrink_some(x + t * width, width, packed, half, 1, there, h + t * columns, columns);
}

/* The first `count` columns of h (tokens, columns) = x (tokens, width) times what `pack_sums` packed. */
static void shrink(const bf16 *x, int64_t tokens, int64_t width, const bf16 *packed, int64_t count, bf16 *h, int64_t columns) {
    for (int64_t r = 0; r < count; r += LANES, packed += LANES * width) {
        __mmask16 there = count - r < LANES ? (__mmask16)((1u << (count - r)) - 1) : 0xffff;
        if (halved(count - r)) shrink_all(x, tokens, width, packed, 1, there, h + r, columns);
        else shrink_all(x, tokens, width, packed, 0, there, h + r, columns);
    }
}

static inline __attribute__((always_inline)) void widen_some(const bf16 *h, int64_t columns, const bf16 *packed, int64_t words,
                                                             const int count, bf16 *y, int64_t width) {
    for (int64_t c = 0; c < width; c += LANES, packed += 2 * LANES * words) {
        __m512 sums[WIDEN];
#pragma GCC unroll 12
        for (int t = 0; t < count; t++) sums[t] = wide(y + t * width + c);
        for (int64_t w = 0; w < words; w++) {
            __m512bh at = both(packed + 2 * LANES * w);
#pragma GCC unroll 12
            for (int t = 0; t < count; t++) sums[t] = _mm512_dpbf16_ps(sums[t], at, two_of(h + t * columns + 2 * w));
        }
#pragma GCC unroll 12
        for (int t = 0; t < count; t++) put(y + t * width + c, sums[t]);
    }
}

/* y (tokens, width) += h (tokens, 2·words of columns) times what `pack_wide` packed. */
static void widen(const bf16 *h, int64_t tokens, int64_t columns, const bf16 *packed, int64_t words, bf16 *y, int64_t width) {
    int64_t t = 0;
    for (; t + WIDEN <= tokens; t += WIDEN) widen_some(h + t * columns, columns, packed, words, WIDEN, y + t * width, width);
    for (; t + 4 <= tokens; t += 4) widen_some(h + t * columns, columns, packed, words, 4, y + t * width, width);
    for (; t < tokens; t++) widen_some(h + t * columns, columns, packed, words, 1, y + t * width, width);
}

void add_to_rows(const Added *added, bf16 *y, int64_t width, int64_t token, int64_t end) {
    for (int64_t t = token; added->bias && t < end; t++)
        for (int64_t c = 0; c < width; c += LANES) put(y + t * width + c, _mm512_add_ps(wide(y + t * width + c), wide(added->bias + c)));
    for (const Wide *of = added->wide; of < added->wide + added->count; of++) {
        int64_t from = of->start > token ? of->start : token, to = of->stop < end ? of->stop : end;
        if (of->layer == added->layer && from < to)
            widen(of->h + (from - of->start) * of->columns, to - from, of->columns, of->packed, of->words, y + from * width, width);
    }
}

/* For 32 columns of x (tokens, width): sums over tokens of x times `pairs_of_tokens` (tokens/2, columns, 2), for `count` columns of that. */
static inline __attribute__((always_inline)) void reduce_some(const bf16 *x, int64_t tokens, int64_t width, const bf16 *pairs_of_tokens,
                                                              int64_t columns, const int count, float sums_of[][LINE]) {
    __m512 sums[REDUCE][2];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t t = 0; t < tokens; t += 2, pairs_of_tokens += 2 * columns) {
        _mm_prefetch((const char *)(x + (t + AHEAD) * width), _MM_HINT_T0);
        _mm_prefetch((const char *)(x + (t + AHEAD + 1) * width), _MM_HINT_T0);
        __m512i one = _mm512_loadu_si512(x + t * width), two = _mm512_setzero_si512();
        if (t + 1 < tokens) two = _mm512_loadu_si512(x + (t + 1) * width);
        __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, two), high = (__m512bh)_mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            __m512bh by = two_of(pairs_of_tokens + 2 * r);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, by);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, by);
        }
    }
    __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) { /* of four columns each, low holds the first, third, … and high the others */
        _mm512_storeu_ps(sums_of[r], _mm512_permutex2var_ps(sums[r][0], first, sums[r][1]));
        _mm512_storeu_ps(sums_of[r] + LANES, _mm512_permutex2var_ps(sums[r][0], second, sums[r][1]));
    }
}

static int reduce(const bf16 *x, int64_t tokens, int64_t width, const bf16 *pairs_of_tokens, int64_t columns, int64_t left,
                  float sums_of[REDUCE][LINE]) {
    if (left >= REDUCE) return reduce_some(x, tokens, width, pairs_of_tokens, columns, REDUCE, sums_of), REDUCE;
    if (left >= 4) return reduce_some(x, tokens, width, pairs_of_tokens, columns, 4, sums_of), 4;
    return reduce_some(x, tokens, width, pairs_of_tokens, columns, 1, sums_of), 1;
}

/* A pair's columns of rows (tokens, columns), two tokens interleaved into words; padded to an even number of tokens. */
static void interleave(const Pair *own, const bf16 *rows, bf16 *to) {
    int64_t tokens = own->stop - own->start, columns = own->columns;
    for (int64_t t = 0; t < tokens; t += 2, rows += 2 * columns, to += 2 * columns)
        for (int64_t c = own->column; c < own->column + even(own->rank); c++) {
            to[2 * c] = rows[c];
            to[2 * c + 1] = t + 1 < tokens ? rows[columns + c] : 0;
        }
}

/* Finds the parts of the pairs; returns their number. */
static int64_t parts_of(const Pair *pairs, int64_t count, Part *parts, int64_t *part_of) {
    int64_t found = 0;
    for (int64_t p = 0; p < count; found++) {
        Part *part = parts + found;
        part->first = p;
        while (p < count && pairs[p].from == pairs[part->first].from) part_of[p++] = found;
        part->last = p;
        part->pieces = (pairs[part->first].stop - pairs[part->first].start + BLOCK - 1) / BLOCK;
    }
    return found;
}

/* The piece with this number among those of all parts. */
static Piece piece_of(const Part *parts, const Pair *pairs, int64_t number) {
    for (; number >= parts->pieces; parts++) number -= parts->pieces;
    const Pair *own = pairs + parts->first;
    int64_t token = own->start + number * BLOCK, left = own->stop - token;
    return (Piece){parts, token, left < BLOCK ? left : BLOCK, own->from + (token - own->start) * own->columns};
}

static int64_t pieces_of(const Part *parts, int64_t count) {
    int64_t found = 0;
    for (int64_t p = 0; p < count; p++) found += parts[p].pieces;
    return found;
}

/* h = x·Aᵀ; if `widened`, also y += s·h·Bᵀ for each pair's layer, else `wide` describes that. Workspace: for each part
   width·whole(columns, 16) numbers, then for each pair outputs·even(rank). */
static void forward(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, const bf16 *x, int64_t width, bf16 *h,
                    bf16 *scratch, Wide *wide, int widened, int threads) {
    Part parts[count];
    int64_t part_of[count], part_count = parts_of(pairs, count, parts, part_of), at = 0;
    for (int64_t p = 0; p < part_count; p++) parts[p].at = at, at += width * whole(pairs[parts[p].first].columns, LANES);
    for (int64_t p = 0; p < count; p++) {
        const Pair *own = pairs + p;
        wide[p] = (Wide){own->layer, own->start, own->stop, own->columns, even(own->rank) / 2, h + own->from + own->column, scratch + at};
        at += layers[own->layer].outputs * even(own->rank);
    }
    int64_t pieces = pieces_of(parts, part_count);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < 2 * count; n++) {
            const Pair *own = pairs + n / 2;
            if (n % 2) pack_wide(own->B, layers[own->layer].outputs, own->rank, own->kind_b, scales[n / 2], wide[n / 2].packed);
            else pack_sums(own->A, own->rank, width, own->kind_a, 1.0f, scratch + parts[part_of[n / 2]].at, own->column, own->columns);
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < pieces; n++) {
            Piece piece = piece_of(parts, pairs, n);
            const Part *part = piece.part;
            int64_t columns = pairs[part->first].columns;
            shrink(x + piece.token * width, piece.tokens, width, scratch + part->at, columns, h + piece.to, columns);
            for (int64_t p = part->first; widened && p < part->last; p++) {
                const Layer *layer = layers + pairs[p].layer;
                Added added = {0, wide + p, 1, pairs[p].layer};
                add_to_rows(&added, layer->rows, layer->outputs, piece.token, piece.token + piece.tokens);
            }
        }
    }
}

void trained_pairs(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, const bf16 *x, int64_t width,
                   bf16 *h, bf16 *scratch, int threads) {
    Wide wide[count];
    forward(pairs, scales, count, layers, x, width, h, scratch, wide, 1, threads);
}

void trained_pairs_shrink(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, const bf16 *x, int64_t width,
                          bf16 *h, bf16 *scratch, Wide *wide, int threads) {
    forward(pairs, scales, count, layers, x, width, h, scratch, wide, 0, threads);
}

/* u = s·g·B; ∂B = s·gᵀ·h (outputs, rank) in fp32, pair after pair; ∂x (tokens, width) += u·A unless null. `wide`, unless null, receives
   what would be added to ∂x. Returns the number of parts. Workspace: for each pair outputs·whole(rank, 16), for each part width·columns
   and even(tokens)·columns numbers. */
static int64_t backward(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, bf16 *grad_x, int64_t width,
                        const bf16 *h, bf16 *u, float *of_b, bf16 *scratch, Wide *wide, int threads) {
    Part parts[count];
    int64_t part_of[count], part_count = parts_of(pairs, count, parts, part_of);
    int64_t at = 0, b_at[count], to_at[count], interleaved_at[count], first = 0, columns = 0;
    int64_t begin[count + 1]; /* first piece of each pair's ∂B, 32 columns of g a piece */
    for (int64_t p = 0; p < count; p++) {
        const Pair *own = pairs + p;
        b_at[p] = at, at += layers[own->layer].outputs * whole(own->rank, LANES);
        to_at[p] = first, first += layers[own->layer].outputs * own->rank;
        begin[p] = columns, columns += layers[own->layer].outputs / LINE;
    }
    begin[count] = columns;
    for (int64_t p = 0; p < part_count; p++) {
        const Pair *own = pairs + parts[p].first;
        parts[p].at = at, at += width * own->columns;
        interleaved_at[p] = at, at += even(own->stop - own->start) * own->columns;
        if (wide)
            wide[p] = (Wide){0, own->start, own->stop, own->columns, own->columns / 2, u + own->from, scratch + parts[p].at};
    }
    int64_t pieces = pieces_of(parts, part_count);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < 3 * count; n++) {
            int64_t p = n / 3, part = part_of[p];
            const Pair *own = pairs + p;
            if (n % 3 == 0)
                pack_sums_across(own->B, layers[own->layer].outputs, own->rank, own->kind_b, scales[p], scratch + b_at[p]);
            else if (n % 3 == 1)
                interleave(own, h + own->from, scratch + interleaved_at[part]);
            else if (grad_x || wide)
                pack_wide_across(own->A, own->rank, width, own->kind_a, scratch + parts[part].at, own->column / 2, own->columns / 2);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t n = 0; n < pieces; n++) {
            Piece piece = piece_of(parts, pairs, n);
            const Part *part = piece.part;
            const Pair *own = pairs + part->first;
            int64_t token = piece.token, tokens = piece.tokens;
            bf16 *to = u + piece.to;
            for (int64_t p = part->first; p < part->last; p++) { /* for an odd rank the last columns of B and u are zeros */
                const Layer *layer = layers + pairs[p].layer;
                shrink(layer->rows + token * layer->outputs, tokens, layer->outputs, scratch + b_at[p], even(pairs[p].rank),
                       to + pairs[p].column, own->columns);
            }
            if (grad_x) widen(to, tokens, own->columns, scratch + part->at, own->columns / 2, grad_x + token * width, width);
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < columns; n++) {
            int64_t p = 0;
            while (begin[p + 1] <= n) p++;
            const Pair *own = pairs + p;
            const Layer *layer = layers + own->layer;
            int64_t c = (n - begin[p]) * LINE, tokens = own->stop - own->start;
            const bf16 *g = layer->rows + own->start * layer->outputs + c, *pairs_of_tokens = scratch + interleaved_at[part_of[p]] + 2 * own->column;
            for (int64_t r = 0; r < own->rank;) {
                float sums[REDUCE][LINE];
                int found = reduce(g, tokens, layer->outputs, pairs_of_tokens + 2 * r, own->columns, own->rank - r, sums);
                float *to = of_b + to_at[p] + c * own->rank + r;
                for (int64_t o = 0; o < LINE; o++)
                    for (int i = 0; i < found; i++) to[o * own->rank + i] = scales[p] * sums[i][o];
                r += found;
            }
        }
    }
    return part_count;
}

void trained_pairs_backward(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, bf16 *grad_x, int64_t width,
                            const bf16 *h, bf16 *u, float *of_b, bf16 *scratch, int threads) {
    backward(pairs, scales, count, layers, grad_x, width, h, u, of_b, scratch, 0, threads);
}

int64_t trained_pairs_shrink_back(const Pair *pairs, const float *scales, int64_t count, const Layer *layers, int64_t width,
                                  const bf16 *h, bf16 *u, float *of_b, bf16 *scratch, Wide *wide, int threads) {
    return backward(pairs, scales, count, layers, 0, width, h, u, of_b, scratch, wide, threads);
}

/* ∂A = uᵀ·x (rank, width) in fp32, pair after pair. Workspace: for each part even(tokens)·columns numbers. */
void trained_pairs_of_a(const Pair *pairs, int64_t count, const bf16 *u, const bf16 *x, int64_t width, float *of_a, bf16 *scratch,
                        int threads) {
    Part parts[count];
    int64_t part_of[count], part_count = parts_of(pairs, count, parts, part_of), at = 0, to_at[count], first = 0;
    int64_t columns = width / LINE;
    for (int64_t p = 0; p < count; p++) to_at[p] = first, first += pairs[p].rank * width;
    for (int64_t p = 0; p < part_count; p++) {
        const Pair *own = pairs + parts[p].first;
        parts[p].at = at, at += even(own->stop - own->start) * own->columns;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < count; p++) interleave(pairs + p, u + pairs[p].from, scratch + parts[part_of[p]].at);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < part_count * columns; n++) {
            const Part *part = parts + n / columns;
            int64_t c = n % columns * LINE;
            for (int64_t p = part->first; p < part->last; p++) {
                const Pair *own = pairs + p;
                const bf16 *pairs_of_tokens = scratch + part->at + 2 * own->column;
                for (int64_t r = 0; r < own->rank;) {
                    float sums[REDUCE][LINE];
                    int found = reduce(x + own->start * width + c, own->stop - own->start, width, pairs_of_tokens + 2 * r, own->columns,
                                       own->rank - r, sums);
                    for (int i = 0; i < found; i++) memcpy(of_a + to_at[p] + (r + i) * width + c, sums[i], sizeof sums[i]);
                    r += found;
                }
            }
        }
    }
}
