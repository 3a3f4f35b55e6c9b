/* Frozen weights (out, in) as they are stored, and back in bf16 (stored.c). */
#ifndef LORAKEET_STORED_H
#define LORAKEET_STORED_H

#include "lanes.h"

/* CODED: INT8 whose products are to run in int8 (int8_rows.h); from Q4_0 on, ggml's types. */
enum { DENSE, NF4, GPTQ, INT8, CODED, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

/* Out and in are multiples of 16. */
typedef struct {
    int64_t kind, out, in;
    const void *codes; /* DENSE: the numbers, bf16; NF4: two codes a byte; GPTQ: (in/8, out), eight codes a word; INT8: (out, in);
                           ggml: (out, blocks) */
    const void *scales; /* NF4: of the blocks, fp32, or uint8 with `outer`; GPTQ: (groups, out), fp16; INT8: (out,), fp32 */
    const void *outer;  /* NF4: of 256 blocks each, fp32, or none; GPTQ: the zero points, (groups, out/8), eight a word */
    const void *more;   /* NF4: the mean that was taken off the scales, one fp32; GPTQ: (in,), the group of each column, int32 */
    const float *levels, *steps; /* NF4: what the 16 codes, and those of the scales, stand for */
    int64_t size, count;         /* NF4: numbers of a block; GPTQ: what is added to each word of zero points, and the groups */
} Stored;

/* How many numbers a block of ggml's has, and how many bytes. */
int64_t gguf_block(int64_t kind, int64_t *bytes);

/* The numbers first … last − 1, multiples of 16, of a row of a weight in ggml's blocks. */
void gguf_row(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to);

/* Of sixteen rows, from `row` on, the columns first … last − 1, multiples of 16, rounded once, to (16, stride); of none that is DENSE. */
void stored_part(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to, int64_t stride);

/* Has what stored_part reads for that brought into the processor's cache; also of one that is DENSE. */
void stored_fetch(const Stored *w, int64_t row, int64_t first, int64_t last);

/* All of it, rounded once, to (out, in). */
void stored_back(const Stored *w, bf16 *to, int threads);

#endif
