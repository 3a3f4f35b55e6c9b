/* Frozen weights (out, in) as they are stored, and their dequantisation to bf16 (stored.c). */
#ifndef LORAKEET_STORED_H
#define LORAKEET_STORED_H

#include "lanes.h"

/* INT8_ROWS: INT8 whose products run in int8 (int8_rows.h); from Q4_0 on, ggml's types. */
enum { DENSE, NF4, GPTQ, INT8, INT8_ROWS, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

/* Out and in are multiples of 16. */
typedef struct {
    int64_t kind, out, in;
    const void *codes; /* DENSE: the numbers, bf16; NF4: two codes a byte; GPTQ: (in/8, out), eight codes a word; INT8: (out, in);
                           ggml: (out, blocks) */
    const void *scales; /* NF4: of the blocks, fp32, or uint8 with `outer`; GPTQ: (groups, out), fp16; INT8: (out,), fp32 */
    const void *outer;  /* NF4: of 256 blocks each, fp32, or none; GPTQ: the zero points, (groups, out/8), eight a word */
    const void *more;   /* NF4: the mean that was subtracted from the scales, one fp32; GPTQ: (in,), the group of each column, int32 */
    const float *levels, *steps; /* NF4: values of the 16 codes, and of the codes of scales */
    int64_t size, count;         /* NF4: block size; GPTQ: what is added to each word of zero points, and the number of groups */
} Stored;

/* Numbers in a block of a ggml type, and its bytes. */
int64_t gguf_block(int64_t kind, int64_t *bytes);

/* Dequantises columns first … last − 1, multiples of 16, of a row in a ggml type. */
void gguf_row(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to);

/* Dequantises columns first … last − 1, multiples of 16, of sixteen rows from `row`, rounded once, to (16, stride). Not for DENSE. */
void stored_part(const Stored *w, int64_t row, int64_t first, int64_t last, bf16 *to, int64_t stride);

/* Prefetches what stored_part would read; also for DENSE. */
void stored_fetch(const Stored *w, int64_t row, int64_t first, int64_t last);

/* Dequantises the whole weight, rounded once, to (out, in). */
void stored_unpack(const Stored *w, bf16 *to, int threads);

#endif
