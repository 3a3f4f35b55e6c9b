/* Products of bf16 rows with a frozen weight (out, in): x·Wᵀ, or g·W if `across`, with fp32 sums that are rounded once.

   The stored weight is not changed. A panel, PANEL columns of the result, is packed at a time (unpack_panels.c) and read again for
   every ROWS tokens, from the L2 cache. Usually each thread packs the panels that it multiplies. Where there are too few panels for
   the threads, or sums longer than DEPTH (which are added in parts) and many tokens, the threads pack a group of panels together, as
   many as fit into PACKED_BYTES. Every row is summed in the same order, whatever the other rows are. */

#include "dense.h"

#include "unpack_panels.h"

#include <omp.h>

#define ROWS 8               /* tokens at once: with WIDE, 24 of the 32 registers */
#define TOKENS 384           /* of a piece of tokens, at most; a piece is a quarter of the rest, */
#define FEWEST 192           /* but at least so many, so that threads finish together */
#define DEPTH 2048           /* terms in a part of a sum */
#define PACKED_BYTES (7 << 17) /* of sums and packed panels at once, but at least one panel for each thread; below 1 MiB,
                                   from which a process with a budget maps memory (memory/allocator) */

/* Arguments of the product of some tokens with a part of a panel. */
typedef struct {
    int64_t stride, depth; /* of x: stride of rows, and terms of this part */
    const __m512i *panel;
    int64_t width, columns; /* of y: stride of rows, and columns in the panel */
    int first, last, add;   /* whether the part is the first and the last of the sums, and whether they are added to y */
    int64_t column;         /* of y: the panel's first column */
    const Added *added;     /* to the finished sums; may be null */
} Part;

static inline __m512 rounded(__m512 x) { return widened(narrow(x)); }

/* What is added to the row `token`; reduces `rows` to those from it on with the same addition. */
static inline const Wide *wide_at(const Added *added, int64_t token, int64_t *rows) {
    const Wide *found = 0;
    for (const Wide *wide = added->wide; wide < added->wide + added->count; wide++) {
        if (wide->layer != added->layer || wide->stop <= token || wide->start >= token + *rows) continue;
        if (wide->start <= token) found = wide;
        int64_t alike = (wide->start <= token ? wide->stop : wide->start) - token;
        if (alike < *rows) *rows = alike;
    }
    return found;
}

/* Rounds y in registers as it would be in memory, adds the bias, and h·Bᵀ unless `of` is null. */
static inline __attribute__((always_inline)) void add_in_registers(const Part *p, const Wide *of, int64_t token, const int rows,
                                                           __m512 acc[ROWS][WIDE]) {
    const bf16 *bias = p->added->bias;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int w = 0; w < WIDE; w++) {
            acc[r][w] = rounded(acc[r][w]);
            if (bias && w * LANES < p->columns) acc[r][w] = rounded(_mm512_add_ps(acc[r][w], wide(bias + p->column + w * LANES)));
        }
    if (!of) return;
    const bf16 *h = of->h + (token - of->start) * of->columns, *packed[WIDE];
#pragma GCC unroll 3
    for (int w = 0; w < WIDE; w++) /* columns beyond the result, which are not stored, read others */
        packed[w] = of->packed + 2 * LANES * of->words * (p->column / LANES + (w * LANES < p->columns ? w : 0));
    for (int64_t k = 0; k < of->words; k++) {
        __m512bh right[WIDE];
#pragma GCC unroll 3
        for (int w = 0; w < WIDE; w++) right[w] = both(packed[w] + 2 * LANES * k);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512bh two = two_of(h + r * of->columns + 2 * k);
#pragma GCC unroll 3
            for (int w = 0; w < WIDE; w++) acc[r][w] = _mm512_dpbf16_ps(acc[r][w], two, right[w]);
        }
    }
}

/* `sums` (tokens, PANEL) hold the sums of earlier parts, and unless this part is the last, receive the new ones. */
static inline __attribute__((always_inline)) void multiply(const Part *p, const bf16 *x, bf16 *y, float *sums, const Wide *of,
                                                           int64_t token, const int rows) {
    __m512 acc[ROWS][WIDE];
    const __m512i *panel = p->panel;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int w = 0; w < WIDE; w++) acc[r][w] = p->first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * PANEL + w * LANES);
    for (int64_t k = 0; k < p->depth; k += 2, panel += WIDE) {
        __m512bh packed[WIDE];
#pragma GCC unroll 3
        for (int w = 0; w < WIDE; w++) packed[w] = (__m512bh)panel[w];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512bh two = two_of(x + r * p->stride + k);
#pragma GCC unroll 3
            for (int w = 0; w < WIDE; w++) acc[r][w] = _mm512_dpbf16_ps(acc[r][w], two, packed[w]);
        }
    }
    if (p->last && p->add)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int w = 0; w < WIDE; w++)
                if (w * LANES < p->columns) acc[r][w] = _mm512_add_ps(wide(y + r * p->width + w * LANES), acc[r][w]);
    if (p->last && p->added) add_in_registers(p, of, token, rows, acc);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int w = 0; w < WIDE; w++) {
            if (!p->last) _mm512_storeu_ps(sums + r * PANEL + w * LANES, acc[r][w]);
            else if (w * LANES < p->columns) put(y + r * p->width + w * LANES, acc[r][w]);
        }
}

/* Bytes for sums that are added in parts. */
static int64_t sums_of(int64_t depth, int threads) { return depth > DEPTH ? threads * TOKENS * PANEL * (int64_t)sizeof(float) : 0; }

static int64_t panels_of(int64_t width) { return (width + PANEL - 1) / PANEL; }

/* Panels that a thread packs for itself at once: two, which fill whole lines of y's rows, if all threads get two and they fit into
   PACKED_BYTES; one for sums longer than DEPTH, since there is memory for one panel's sums. */
static int64_t together_of(int64_t depth, int64_t width, int threads) {
    return depth <= DEPTH && 2 * threads * 2 * depth * PANEL <= PACKED_BYTES && panels_of(width) >= 2 * threads ? 2 : 1;
}

/* How many panels are packed at once. */
static int64_t group_of(int64_t depth, int64_t width, int threads) {
    int64_t panels = panels_of(width), fit = (PACKED_BYTES - sums_of(depth, threads)) / (2 * depth * PANEL);
    if (fit < threads) fit = threads;
    int64_t groups = (panels + fit - 1) / fit;
    return (panels + groups - 1) / groups; /* of about equal size */
}

int64_t dense_scratch(int64_t depth, int64_t width, int threads) {
    int64_t together = group_of(depth, width, threads) * depth;
    int64_t apart = threads * together_of(depth, width, threads) * (depth < DEPTH ? depth : DEPTH);
    return 2 * (together > apart ? together : apart) * PANEL + sums_of(depth, threads);
}

/* Arguments of stored_product, and its workspace. */
typedef struct {
    const bf16 *x;
    const Stored *weight;
    bf16 *y;
    __m512i *packed;
    float *sums;
    int64_t depth, width;
    int across, add;
    const Added *added;
    int threads;
} Product;

/* Packs terms `from` … `to` − 1 of `count` panels from the n-th, `size` registers apart. */
static void pack(const Product *o, int64_t n, int64_t count, int64_t from, int64_t to, __m512i *panels, int64_t size) {
    if (o->across)
        for (int64_t row = from; row < to; row += LANES)
            pack_columns(o->weight, row, n * PANEL, count, size, panels + (row - from) / 2 * WIDE);
    else
        for (int64_t w = 0; w < count * WIDE; w++)
            pack_rows(o->weight, n * PANEL + w * LANES, from, to, w % WIDE, panels + w / WIDE * size);
}

/* Rows `token` … `end` − 1 of y's n-th panel, over the packed terms from k, DEPTH at most. */
static void multiply_rows(const Product *o, int64_t n, int64_t k, const __m512i *packed, int64_t token, int64_t end) {
    int64_t depth = o->depth, width = o->width, terms = k + DEPTH < depth ? DEPTH : depth - k;
    Part p = {depth, terms, packed, width, width - n * PANEL, k == 0, k + terms == depth, o->add, n * PANEL, o->added};
    const bf16 *from = o->x + token * depth + k;
    bf16 *to = o->y + token * width + n * PANEL;
    float *at = o->sums + (depth > DEPTH ? omp_get_thread_num() * TOKENS * PANEL : 0);
    for (int64_t rows; token < end; token += rows, from += rows * depth, to += rows * width, at += rows * PANEL) {
        rows = end - token < ROWS ? end - token : ROWS;
        const Wide *of = p.added ? wide_at(p.added, token, &rows) : 0;
        switch (rows) {
        case 8: multiply(&p, from, to, at, of, token, 8); break;
        case 7: multiply(&p, from, to, at, of, token, 7); break;
        case 6: multiply(&p, from, to, at, of, token, 6); break;
        case 5: multiply(&p, from, to, at, of, token, 5); break;
        case 4: multiply(&p, from, to, at, of, token, 4); break;
        case 3: multiply(&p, from, to, at, of, token, 3); break;
        case 2: multiply(&p, from, to, at, of, token, 2); break;
        case 1: multiply(&p, from, to, at, of, token, 1); break;
        }
    }
}

/* How many units of together_of panels there are. */
static int64_t units_of(const Product *o) {
    int64_t together = together_of(o->depth, o->width, o->threads);
    return (panels_of(o->width) + together - 1) / together;
}

/* How many of the last units are divided by pieces of tokens: one for each thread that may still be working when no others are left. */
static int64_t divided_of(const Product *o) {
    int64_t units = units_of(o);
    return o->threads - 1 < units ? o->threads - 1 : units;
}

/* True if threads that pack what they multiply repeat no more units than there are. */
static int each_for_itself(const Product *o, int64_t parts) {
    int64_t again = (parts < o->threads ? parts : o->threads) - 1;
    return o->depth <= DEPTH && divided_of(o) * again <= units_of(o);
}

/* Each thread packs the panels that it multiplies, in its own cache: for all tokens, or, for divided units, for pieces of the tokens.
   There is one piece where sums are longer than DEPTH. */
static void by_panels(const Product *o, const int64_t *begins, int64_t parts) {
    int64_t depth = o->depth, panels = panels_of(o->width), together = together_of(depth, o->width, o->threads);
    int64_t divided = divided_of(o), others = units_of(o) - divided, size = (depth < DEPTH ? depth : DEPTH) / 2 * WIDE;
#pragma omp parallel num_threads(o->threads)
    {
        __m512i *own = o->packed + omp_get_thread_num() * together * size;
        int64_t packed = -1;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < others + divided * parts; u++) {
            int64_t unit = u, token = 0, end = begins[parts];
            if (u >= others) {
                int64_t part = (u - others) % parts;
                unit = others + (u - others) / parts, token = begins[part], end = begins[part + 1];
            }
            int64_t n = unit * together, count = n + together < panels ? together : panels - n;
            for (int64_t k = 0; k < depth; k += DEPTH) {
                if (packed != unit || depth > DEPTH) pack(o, n, count, k, k + DEPTH < depth ? k + DEPTH : depth, own, size);
                for (int64_t i = 0; i < count; i++) multiply_rows(o, n + i, k, own + i * size, token, end);
                packed = unit;
            }
        }
    }
}

/* Threads pack panels together, and multiply them by pieces of the tokens. */
static void by_groups(const Product *o, const int64_t *begins, int64_t parts) {
    int64_t depth = o->depth, panels = panels_of(o->width), group = group_of(depth, o->width, o->threads);
    int64_t size = depth / 2 * WIDE;
#pragma omp parallel num_threads(o->threads)
    for (int64_t begin = 0; begin < panels; begin += group) {
        int64_t stop = begin + group < panels ? begin + group : panels;
        if (o->across) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < depth; row += LANES)
                pack_columns(o->weight, row, begin * PANEL, stop - begin, size, o->packed + row / 2 * WIDE);
        } else {
#pragma omp for collapse(2) schedule(static)
            for (int64_t n = begin; n < stop; n++)
                for (int64_t w = 0; w < WIDE; w++)
                    pack_rows(o->weight, n * PANEL + w * LANES, 0, depth, w, o->packed + (n - begin) * size);
        }
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t part = 0; part < parts; part++)
            for (int64_t n = begin; n < stop; n++)
                for (int64_t k = 0; k < depth; k += DEPTH)
                    multiply_rows(o, n, k, o->packed + (n - begin) * size + k / 2 * WIDE, begins[part], begins[part + 1]);
    }
}

/* Starts of the pieces of so many tokens, and the end of the last; at most tokens / FEWEST + 1 pieces. */
static int64_t pieces_of(int64_t tokens, int64_t *begin) {
    int64_t count = 0;
    for (int64_t at = 0; at < tokens; count++) {
        int64_t part = (tokens - at) / 4 / ROWS * ROWS;
        begin[count] = at;
        at += part < FEWEST ? FEWEST : part > TOKENS ? TOKENS : part;
        if (tokens - at < FEWEST / 2) at = tokens;
    }
    begin[count] = tokens;
    return count;
}

/* y (tokens, width) = x (tokens, depth)·Wᵀ, or x·W if `across`; with `add`, added to y. Depth and width are multiples of 16; `scratch`
   has dense_scratch bytes. */
void dense_product(const bf16 *x, const bf16 *weight, bf16 *y, uint8_t *scratch, int64_t tokens, int64_t depth, int64_t width,
                   int across, int add, int threads) {
    Stored dense = {.kind = DENSE, .out = across ? depth : width, .in = across ? width : depth, .codes = weight};
    stored_product(x, &dense, y, scratch, tokens, across, add, 0, threads);
}

void stored_product(const bf16 *x, const Stored *weight, bf16 *y, uint8_t *scratch, int64_t tokens, int across, int add,
                    const Added *added, int threads) {
    int64_t depth = across ? weight->out : weight->in, width = across ? weight->in : weight->out;
    if (!tokens) return;
    int64_t begins[tokens / FEWEST + 2], parts = pieces_of(tokens, begins);
    float *sums = (float *)scratch;
    scratch += sums_of(depth, threads);
    Product whole = {x, weight, y, (__m512i *)scratch, sums, depth, width, across, add, added, threads};
    if (parts == 1 || each_for_itself(&whole, parts)) by_panels(&whole, begins, parts);
    else by_groups(&whole, begins, parts);
}
