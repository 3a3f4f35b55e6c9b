/* Products of bf16 rows and a frozen weight in int8 (out, in), with sums in int32, which are exact up to 2¹⁷ terms.

   A row is quantised to the nearest whole steps q in [−127, 127]. The processor multiplies unsigned bytes by signed bytes, four at a
   time, so a row is stored as q + 128, and each sum starts at −128 times the weight's own sum.

   A few outlier columns of x may be large in every row (after a norm, say), and would leave the others few steps. They stay in bf16,
   count as zeros in the codes, and are multiplied with the weight's columns when the sums are dequantised.

   The stored weight is not changed. For some tokens and PANEL columns of the result at a time it is packed, four numbers of each
   column side by side, in memory that stays in the L2 cache (98 KB for 1,536 terms; not measured for wider weights). */

#include "int8_rows.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define WIDE 4              /* registers of sums side by side */
#define PANEL (WIDE * LANES) /* columns of the result at once */
#define ROWS 6              /* tokens at once: with WIDE, 24 of the 32 registers */
#define TOKENS 240          /* for which a panel is packed once: 1/40 of the product's time */
#define STEPS 127.0f

void outlier_columns(const bf16 *x, uint16_t *peaks, int64_t *columns, bf16 *apart, int64_t tokens, int64_t width, int64_t count,
                  int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < width; c += LANES) {
        __m256i most = _mm256_setzero_si256(), sign = _mm256_set1_epi16(0x7fff);
        for (int64_t t = 0; t < tokens; t++) /* as integers NaN > infinity > all others */
            most = _mm256_max_epu16(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + t * width + c)), sign));
        _mm256_storeu_si256((__m256i *)(peaks + c), most);
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t best = -1;
        for (int64_t c = 0; c < width; c++) {
            int taken = 0;
            for (int64_t j = 0; j < i; j++) taken |= columns[j] == c;
            if (!taken && (best < 0 || peaks[c] > peaks[best])) best = c;
        }
        columns[i] = best;
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < count; i++) apart[t * count + i] = x[t * width + columns[i]];
}

static inline __m512 scaled(const bf16 *x, const float *by, const uint16_t *keep, int64_t c) {
    __m512 at = _mm512_maskz_mov_ps((__mmask16)keep[c / LANES], wide(x + c));
    return by ? _mm512_mul_ps(at, _mm512_loadu_ps(by + c)) : at;
}

void quantise_rows(const bf16 *x, const float *by, const int64_t *columns, int64_t count, uint8_t *codes, float *steps, int64_t tokens,
               int64_t width, int threads) {
    uint16_t keep[width / LANES]; /* a bit for each column that is no outlier */
    memset(keep, 0xff, sizeof keep);
    for (int64_t i = 0; i < count; i++) keep[columns[i] / LANES] &= (uint16_t)~(1u << columns[i] % LANES);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        const bf16 *row = x + t * width;
        __m512i largest = _mm512_setzero_si512(), sign = _mm512_set1_epi32(0x7fffffff);
        for (int64_t c = 0; c < width; c += LANES) /* as integers NaN > infinity > all others */
            largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(scaled(row, by, keep, c)), sign));
        union { uint32_t bits; float value; } most = {_mm512_reduce_max_epu32(largest)};
        float step = most.value / STEPS, inverse = 1.0f / step;
        int whole = most.bits < 0x7f800000; /* neither infinite nor NaN */
        if (!whole || !(inverse <= 3.4e38f)) inverse = 0.0f, step = whole ? 0.0f : NAN;
        steps[t] = step;
        __m512 times = _mm512_set1_ps(inverse);
        for (int64_t c = 0; c < width; c += LANES) {
            __m512i nearest = _mm512_cvtps_epi32(_mm512_mul_ps(scaled(row, by, keep, c), times));
            __m128i q = _mm512_cvtsepi32_epi8(whole ? nearest : _mm512_setzero_si512());
            _mm_storeu_si128((__m128i *)(codes + t * width + c), _mm_xor_si128(q, _mm_set1_epi8((char)0x80)));
        }
    }
}

/* Packs rows of the weight (out, in) from `first` as columns of x·Wᵀ: panel[in / 4][WIDE][16 rows][4]; rows beyond it are zeros. */
static void pack_rows(const int8_t *weight, int64_t first, int64_t out, int64_t in, __m512i *panel) {
    for (int64_t w = 0; w < WIDE; w++)
        for (int64_t c = 0; c < in; c += 64) {
            int64_t quads = in - c < 64 ? (in - c) / 4 : 16;
            __m512i rows[16];
            for (int64_t l = 0; l < 16; l++) {
                int64_t row = first + w * 16 + l;
                rows[l] = row < out ? _mm512_maskz_loadu_epi32((__mmask16)((1u << quads) - 1), weight + row * in + c)
                                    : _mm512_setzero_si512();
            }
            transposed(rows);
            for (int64_t k = 0; k < quads; k++) panel[(c / 4 + k) * WIDE + w] = rows[k];
        }
}

/* Packs columns of the weight (out, in) from `first` as columns of g·W: panel[out / 4][WIDE][16 columns][4 rows]. */
static void pack_columns(const int8_t *weight, int64_t first, int64_t out, int64_t in, __m512i *panel) {
    __mmask64 there = in - first < 64 ? ((__mmask64)1 << (in - first)) - 1 : ~(__mmask64)0;
    for (int64_t k = 0; k < out / 4; k++) {
        const int8_t *at = weight + 4 * k * in + first;
        __m512i one = _mm512_maskz_loadu_epi8(there, at), two = _mm512_maskz_loadu_epi8(there, at + in);
        __m512i three = _mm512_maskz_loadu_epi8(there, at + 2 * in), four = _mm512_maskz_loadu_epi8(there, at + 3 * in);
        __m512i a = _mm512_unpacklo_epi8(one, two), b = _mm512_unpackhi_epi8(one, two);
        __m512i c = _mm512_unpacklo_epi8(three, four), d = _mm512_unpackhi_epi8(three, four);
        __m512i e = _mm512_unpacklo_epi16(a, c), f = _mm512_unpackhi_epi16(a, c); /* the first 4 of each 16 columns, the next 4 */
        __m512i g = _mm512_unpacklo_epi16(b, d), h = _mm512_unpackhi_epi16(b, d);
        __m512i p = _mm512_shuffle_i32x4(e, f, 0x44), q = _mm512_shuffle_i32x4(g, h, 0x44);
        __m512i r = _mm512_shuffle_i32x4(e, f, 0xee), s = _mm512_shuffle_i32x4(g, h, 0xee);
        __m512i *to = panel + k * WIDE;
        to[0] = _mm512_shuffle_i32x4(p, q, 0x88), to[1] = _mm512_shuffle_i32x4(p, q, 0xdd);
        to[2] = _mm512_shuffle_i32x4(r, s, 0x88), to[3] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
}

/* Arguments of the product of `rows` tokens. */
typedef struct {
    const uint8_t *codes; /* (tokens, depth) */
    const float *steps;   /* (tokens,) */
    const __m512i *panel;
    __m512i begin[WIDE]; /* −128 · the sum of each column */
    const float *scale;  /* of the panel's columns; may be null */
    int64_t depth, width;
    int64_t columns; /* of the panel that are within the result */
    const bf16 *apart; /* outlier columns of x (tokens, count); `words`: the panel's numbers for them, in twos */
    int64_t count;
    __m512bh words[OUTLIERS / 2][WIDE];
} Piece;

static inline __attribute__((always_inline)) void multiply(const Piece *p, int64_t token, bf16 *y, const int rows) {
    __m512i sums[ROWS][WIDE];
    const uint8_t *codes = p->codes + token * p->depth;
    const __m512i *panel = p->panel;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) sums[r][w] = p->begin[w];
    for (int64_t k = 0; k < p->depth; k += 4, panel += WIDE) {
        __m512i right[WIDE];
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) right[w] = panel[w];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512i four = _mm512_set1_epi32(*(const int32_t *)(codes + r * p->depth + k));
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) sums[r][w] = _mm512_dpbusd_epi32(sums[r][w], four, right[w]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m512 step = _mm512_set1_ps(p->steps[token + r]);
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++)
            if (w * LANES < p->columns) {
                int64_t left = p->columns - w * LANES;
                __mmask16 there = left < LANES ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
                __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][w]), step);
                for (int64_t i = 0; i < p->count; i += 2)
                    found = _mm512_dpbf16_ps(found, p->words[i / 2][w], two_of(p->apart + (token + r) * p->count + i));
                if (p->scale) found = _mm512_mul_ps(found, _mm512_maskz_loadu_ps(there, p->scale + w * LANES));
                _mm256_mask_storeu_epi16(y + (token + r) * p->width + w * LANES, there, narrow(found));
            }
    }
}

/* Packs the outlier columns of a weight (out, in), for the rows of a panel. */
static void pack_outliers(const int8_t *weight, const int64_t *columns, int64_t first, int64_t out, int64_t in, Piece *piece) {
    for (int64_t i = 0; i < piece->count; i++)
        for (int64_t w = 0; w < WIDE; w++)
            for (int64_t l = 0; l < LANES; l++) {
                int64_t row = first + w * LANES + l;
                union { float value; uint32_t bits; } one = {row < out ? (float)weight[row * in + columns[i]] : 0.0f};
                ((bf16 *)&piece->words[i / 2][w])[2 * l + i % 2] = (bf16)(one.bits >> 16); /* integers below 256 are exact */
            }
}

int64_t int8_scratch(int64_t depth) { return PANEL * depth; }

int int8_threads(int64_t tokens, int64_t width, int threads) {
    int64_t pieces = (tokens + TOKENS - 1) / TOKENS * ((width + PANEL - 1) / PANEL);
    return pieces < threads ? (int)(pieces < 1 ? 1 : pieces) : threads;
}

void int8_product(const uint8_t *codes, const float *steps, const int8_t *weight, const float *scale, const int64_t *columns,
                   const bf16 *apart, int64_t count, bf16 *y, uint8_t *scratch, int64_t tokens, int64_t depth, int64_t width,
                   int across, int threads) {
    int64_t panels = (width + PANEL - 1) / PANEL, parts = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t number = 0; number < panels; number++) {
            __m512i *panel = (__m512i *)(scratch + omp_get_thread_num() * PANEL * depth);
            int64_t first = number * PANEL, token = part * TOKENS, end = token + TOKENS < tokens ? token + TOKENS : tokens;
            Piece piece = {codes, steps, panel, {{0}}, scale ? scale + first : 0, depth, width, width - first, apart, count};
            if (across) pack_columns(weight, first, depth, width, panel);
            else pack_rows(weight, first, width, depth, panel);
            pack_outliers(weight, columns, first, width, depth, &piece);
            __m512i sums[WIDE] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int64_t k = 0; k < depth / 4; k++)
                for (int w = 0; w < WIDE; w++)
                    sums[w] = _mm512_dpbusd_epi32(sums[w], _mm512_set1_epi8(1), panel[k * WIDE + w]);
            for (int w = 0; w < WIDE; w++)
                piece.begin[w] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums[w], 7));
            for (; token + ROWS <= end; token += ROWS) multiply(&piece, token, y + first, ROWS);
            switch (end - token) {
            case 5: multiply(&piece, token, y + first, 5); break;
            case 4: multiply(&piece, token, y + first, 4); break;
            case 3: multiply(&piece, token, y + first, 3); break;
            case 2: multiply(&piece, token, y + first, 2); break;
            case 1: multiply(&piece, token, y + first, 1); break;
            }
        }
}
