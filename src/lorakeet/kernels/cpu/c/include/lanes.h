/* Sixteen numbers at a time: bf16 in memory, fp32 in registers. */
#ifndef LORAKEET_LANES_H
#define LORAKEET_LANES_H

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;
#define LANES 16
#define LOG2E 1.44269504088896340736f

static inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

static inline __m512 wide(const bf16 *x) { return widened(_mm256_loadu_si256((const __m256i *)x)); }

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); } /* to the nearest, ties to even */

static inline void put(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, narrow(x)); }

/* Rounds both to bf16: `one` in the lower half, `two` in the upper. */
static inline __m512i narrow_two(__m512 one, __m512 two) { return (__m512i)_mm512_cvtne2ps_pbh(two, one); }

/* Interleaves the two halves: their first numbers, then their second ones, and so on. */
static inline __m512i interleaved(__m512i x) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                           19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, x);
}

static inline __m512bh both(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); } /* two factors for each of sixteen sums */

static inline __m512bh two_of(const bf16 *x) { /* the same two factors for all sums */
    int32_t two;
    __builtin_memcpy(&two, x, sizeof two);
    return (__m512bh)_mm512_set1_epi32(two);
}

static inline __m512bh four_of(const bf16 *x) { /* the same four: the first two and the last two alternate */
    int64_t four;
    __builtin_memcpy(&four, x, sizeof four);
    return (__m512bh)_mm512_set1_epi64(four);
}

/* 2ˣ with a relative error of about 2e-7, by a minimax polynomial in the fraction f, |f| <= 1/2. x is clamped at −150, where the
   result is 0. */
static inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x); /* this order of arguments keeps NaN */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.3264735462144017e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.67151764780283e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550733953714371e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022242426872253e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931470036506653e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* Transposes 4×4 words of four bytes within each four columns: s[i] has the i-th of every four. */
static inline void fours_transposed(const __m512i r[4], __m512i s[4]) {
    __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    s[0] = _mm512_unpacklo_epi64(a, c), s[1] = _mm512_unpackhi_epi64(a, c);
    s[2] = _mm512_unpacklo_epi64(b, d), s[3] = _mm512_unpackhi_epi64(b, d);
}

/* Transposes sixteen rows of sixteen words of four bytes. */
static inline void transposed(__m512i r[16]) {
    __m512i s[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) fours_transposed(r + i, s + i);
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) { /* s[i], s[4 + i], …: column 4·lane + i of four rows each */
        __m512i a = _mm512_shuffle_i32x4(s[i], s[4 + i], 0x44), b = _mm512_shuffle_i32x4(s[i], s[4 + i], 0xee);
        __m512i c = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0x44), d = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0xee);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88), r[4 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88), r[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

#endif
