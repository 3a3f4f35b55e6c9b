/* A whole decoder block with pairs, in training and without gradients: two norms, attention over packed rows, a gated MLP. All seven
   frozen weights have pairs; q, k and v may have biases. Rounding and order are those of the separate kernels.

       x ──┬── norm ── q, k, v ── rotation ── attention ── o ──+──┬── norm ── gate, up ── silu(gate) ∘ up ── down ──+── y
           └───────────────────────────────────────────────────┘  └────────────────────────────────────────────────┘

   The backward pass goes from right to left, with the formulas in dense.c, trained_pairs.c, attention.c and elementwise.c. ∂x is the sum
   over the layers that share the input x; a residual adds the gradient from above to that of the branch's norm:
   ∂x = ∂middle + norm′(∂q·W_q + ∂k·W_k + ∂v·W_v), with ∂middle, between the halves, = ∂y + norm′(∂gate·W_gate + ∂up·W_up), each W with
   its pair.

   Saved for the backward pass: ρ of both norms, the rotated q and k, v, attention's result and log-sums, the state between the halves,
   gate and up, and h = x·Aᵀ of all pairs. Where the heads of q and k are normed, they are saved before that, with ρ of each head, and
   normed and rotated again. */

#include "attention.h"
#include "int8_rows.h"
#include "dense.h"
#include "elementwise.h"
#include "stored.h"
#include "trained_pairs.h"

#include <string.h>

#define LINED 64 /* bytes of alignment */
#define PIECE 24 /* tokens that are added to at once */

enum { QKV, O, GATE_UP, DOWN, GROUPS }; /* layers that share their input */

typedef struct {
    Stored q, k, v, o, gate, up, down;
    const bf16 *biases[3];      /* of q, k and v; null for none */
    const bf16 *heads[2];       /* gains of the norms of q's and k's heads; null for none */
    const bf16 *first, *second; /* gains of the norms */
    float epsilons[2], head_epsilons[2];
    int64_t hidden, inner; /* widths of x and of the MLP, multiples of 32 */
} Weights;

/* The pairs of layers that share their input; counts as in kernels/cpu/trained_pairs: of h, of workspace, of the gradients. */
typedef struct {
    const Pair *pairs;
    const float *scales;
    int64_t count, numbers, forward, backward, interleaved, of_a, of_b;
} Group;

typedef struct {
    char *at;
    int64_t bytes; /* in use */
} Workspace;

static void *take(Workspace *space, int64_t bytes) {
    char *found = space->at + space->bytes;
    space->bytes += (bytes + LINED - 1) / LINED * LINED;
    return found;
}

static bf16 *take_rows(Workspace *space, int64_t tokens, int64_t width) { return take(space, tokens * width * (int64_t)sizeof(bf16)); }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct {
    float *first_rho, *second_rho, *logs, *rho[2];
    bf16 *q, *k, *v, *attended, *middle, *gate, *up, *h[GROUPS];
    int64_t apart; /* bytes of gate and up together */
} Saved;

/* Kind of pass; ALONE has no backward pass, so nothing needs to be saved. */
enum { FORWARD, BACKWARD, ALONE };

/* In a pass ALONE gate and up reuse the memory of q, k, v and attention's result. */
static Saved saved_in(Workspace *space, const Weights *w, const Shape *s, const Group *groups, int pass) {
    Saved k;
    int64_t n = s->tokens;
    k.first_rho = take(space, n * (int64_t)sizeof(float));
    k.second_rho = take(space, n * (int64_t)sizeof(float));
    k.logs = take(space, s->heads * n * (int64_t)sizeof(float));
    for (int i = 0; i < 2; i++) k.rho[i] = w->heads[i] ? take(space, (i ? s->kv : s->heads) * n * (int64_t)sizeof(float)) : 0;
    k.middle = take_rows(space, n, w->hidden);
    Workspace later = *space;
    k.q = take_rows(space, n, s->heads * s->d);
    k.k = take_rows(space, n, s->kv * s->d);
    k.v = take_rows(space, n, s->kv * s->d);
    k.attended = take_rows(space, n, s->heads * s->d);
    if (pass != ALONE) later = *space;
    k.apart = -later.bytes;
    k.gate = take_rows(&later, n, w->inner);
    k.up = take_rows(&later, n, w->inner);
    k.apart += later.bytes;
    space->bytes = larger(space->bytes, later.bytes);
    for (int g = 0; g < GROUPS; g++) k.h[g] = take_rows(space, 1, groups[g].numbers);
    return k;
}

/* Bytes that are saved for the backward pass. */
int64_t trained_block_saved(const Weights *w, const Shape *s, const Group *groups, int pass) {
    Workspace space = {0, 0};
    saved_in(&space, w, s, groups, pass);
    return space.bytes;
}

static int least(int threads, int64_t parts) { return parts < threads ? (int)parts : threads; }

/* The most bytes of workspace that one product or attention of a block needs. */
static int64_t work(const Weights *w, const Shape *s, int threads, int backward) {
    int64_t q = s->heads * s->d, kv = s->kv * s->d, parts = backward ? s->parts * s->groups : s->heads * s->rows;
    int64_t most = least(threads, parts) * attention_workspace(s);
    const int64_t widths[] = {q, kv, w->inner};
    for (int i = 0; i < 3; i++) {
        most = larger(most, dense_scratch(w->hidden, widths[i], threads));
        most = larger(most, dense_scratch(widths[i], w->hidden, threads));
    }
    return most;
}

/* The most numbers of workspace for one group's packed factors. */
static int64_t factors(const Group *groups, int backward) {
    int64_t most = 0;
    for (int g = 0; g < GROUPS; g++)
        most = larger(most, backward ? larger(groups[g].backward, groups[g].interleaved) : groups[g].forward);
    return most;
}

/* Quantised rows for products in int8, and a buffer for such a product before it is added to another. */
typedef struct {
    uint8_t *codes, *work;
    float *steps;
    int64_t *columns;
    bf16 *apart, *product;
    uint16_t *peaks;
} Int8Rows;

static Int8Rows int8_rows_in(Workspace *space, const Weights *w, const Shape *s, int threads, int backward) {
    Int8Rows c = {0};
    const Stored *layers[] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->up, &w->down};
    int64_t widest = 0;
    for (int i = 0; i < 7; i++)
        if (layers[i]->kind == INT8_ROWS) widest = larger(widest, larger(layers[i]->in, layers[i]->out));
    if (!widest) return c;
    c.codes = take(space, s->tokens * widest);
    c.work = take(space, threads * int8_scratch(widest));
    c.steps = take(space, s->tokens * (int64_t)sizeof(float));
    c.columns = take(space, OUTLIERS * (int64_t)sizeof(int64_t));
    c.apart = take_rows(space, s->tokens, OUTLIERS);
    if (backward) c.product = take_rows(space, s->tokens, w->hidden);
    c.peaks = take(space, widest * (int64_t)sizeof(uint16_t));
    return c;
}

/* A buffer for the rotated q or k if it is saved before its norm; else the saved one itself. */
static bf16 *rotated_in(Workspace *space, const Weights *w, const Shape *s, int which, bf16 *saved) {
    return w->heads[which] ? take_rows(space, s->tokens, (which ? s->kv : s->heads) * s->d) : saved;
}

typedef struct {
    bf16 *normed, *inner, *q, *k, *factors;
    uint8_t *work;
    Int8Rows int8;
} Forward;

static Forward forward_in(Workspace *space, const Weights *w, const Shape *s, const Group *groups, const Saved *saved, int pass,
                          int threads) {
    Forward f;
    f.q = rotated_in(space, w, s, 0, saved->q);
    f.k = rotated_in(space, w, s, 1, saved->k);
    f.normed = take_rows(space, s->tokens, w->hidden);
    f.inner = pass == ALONE ? saved->gate : take_rows(space, s->tokens, w->inner);
    f.work = take(space, work(w, s, threads, 0));
    f.factors = take_rows(space, 1, factors(groups, 0));
    f.int8 = int8_rows_in(space, w, s, threads, 0);
    return f;
}

/* Gradients of q, k, v and of attention's result, and attention's sums. */
typedef struct {
    bf16 *attended, *q, *k, *v;
    float *sums, *of_prefix;
} Attention;

static void states_in(Workspace *space, const Shape *s, Attention *a) {
    a->attended = take_rows(space, s->tokens, s->heads * s->d);
    a->q = take_rows(space, s->tokens, s->heads * s->d);
    a->k = take_rows(space, s->tokens, s->kv * s->d);
    a->v = take_rows(space, s->tokens, s->kv * s->d);
}

static void sums_in(Workspace *space, const Shape *s, Attention *a) {
    a->sums = take(space, 2 * s->parts * s->tokens * s->d * (int64_t)sizeof(float));
    a->of_prefix = take(space, 2 * s->parts * (s->groups - 1) * s->prefix * s->d * (int64_t)sizeof(float));
}

/* Allocates in `spare` if everything that `allocate` takes fits into `bytes`, else in `space`. */
static void allocate_in(void (*allocate)(Workspace *, const Shape *, Attention *), Workspace *spare, int64_t bytes, Workspace *space, const Shape *s,
                   Attention *a) {
    Workspace tried = *spare;
    allocate(&tried, s, a);
    if (tried.bytes <= bytes) *spare = tried;
    else allocate(space, s, a);
}

/* `inner`, then q and k, share memory with `normed` and `grad`: their lifetimes do not overlap. */
typedef struct {
    bf16 *inner, *normed, *grad, *u, *q, *k, *factors;
    uint8_t *work;
    Int8Rows int8;
    Attention attention; /* in the memory of gate and up, as far as it fits */
} Backward;

static Backward backward_in(Workspace *space, const Weights *w, const Shape *s, const Group *groups, const Saved *saved, int threads) {
    Backward b;
    int64_t numbers = 0;
    for (int g = 0; g < GROUPS; g++) numbers = larger(numbers, groups[g].numbers);
    Workspace first = *space, between = *space;
    b.inner = take_rows(&first, s->tokens, w->inner);
    b.q = rotated_in(&between, w, s, 0, saved->q);
    b.k = rotated_in(&between, w, s, 1, saved->k);
    b.normed = take_rows(space, s->tokens, w->hidden);
    b.grad = take_rows(space, s->tokens, w->hidden);
    space->bytes = larger(space->bytes, larger(first.bytes, between.bytes));
    b.u = take_rows(space, 1, numbers);
    b.work = take(space, work(w, s, threads, 1));
    b.factors = take_rows(space, 1, factors(groups, 1));
    b.int8 = int8_rows_in(space, w, s, threads, 1);
    Workspace spare = {(char *)saved->gate, 0};
    allocate_in(states_in, &spare, saved->apart, space, s, &b.attention);
    allocate_in(sums_in, &spare, saved->apart, space, s, &b.attention);
    return b;
}

/* Bytes of workspace of a pass. */
int64_t trained_block_scratch(const Weights *w, const Shape *s, const Group *groups, int pass, int threads) {
    Workspace space = {0, 0}, saved = {0, 0};
    Saved k = saved_in(&saved, w, s, groups, pass);
    if (pass == BACKWARD) backward_in(&space, w, s, groups, &k, threads);
    else forward_in(&space, w, s, groups, &k, pass, threads);
    return space.bytes;
}

/* y = a + b of `count` numbers, a multiple of 16; y may be a or b. */
static void add(const bf16 *a, const bf16 *b, bf16 *y, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) put(y + i, _mm512_add_ps(wide(a + i), wide(b + i)));
}

/* Adds `added`, unless null, to all rows of y, after a product that cannot add it itself. */
static void add_to_all(const Added *added, bf16 *y, int64_t tokens, int64_t width, int threads) {
    if (!added) return;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t += PIECE) add_to_rows(added, y, width, t, t + PIECE < tokens ? t + PIECE : tokens);
}

/* Workspace and threads of a product with a frozen weight or with pairs. */
typedef struct {
    int64_t tokens;
    bf16 *factors;
    uint8_t *work;
    Int8Rows int8;
    int threads;
} Context;

/* The y of each layer that has the input x, with biases (may be null) and pairs, whose h is saved. x is quantised once for all int8
   products. */
static void times(Context a, const bf16 *x, int count, const Stored *w, const Layer *ys, const bf16 *const *biases, const Group *group,
                  bf16 *h) {
    Int8Rows *c = &a.int8;
    int64_t n = a.tokens, in = w->in, apart = int8_outliers(in);
    Wide wide[group->count];
    trained_pairs_shrink(group->pairs, group->scales, group->count, ys, x, in, h, a.factors, wide, a.threads);
    for (int i = 0, quantised = 0; i < count; i++, w++) {
        bf16 *y = ys[i].rows;
        Added added = {biases ? biases[i] : 0, wide, group->count, i};
        if (w->kind != INT8_ROWS) {
            stored_product(x, w, y, a.work, n, 0, 0, &added, a.threads);
            continue;
        }
        if (!quantised) {
            outlier_columns(x, c->peaks, c->columns, c->apart, n, in, apart, a.threads);
            quantise_rows(x, 0, c->columns, apart, c->codes, c->steps, n, in, a.threads);
            quantised = 1;
        }
        int8_product(c->codes, c->steps, w->codes, w->scales, c->columns, c->apart, apart, y, c->work, n, in, w->out, 0,
                      int8_threads(n, w->out, a.threads));
        add_to_all(&added, y, n, w->out, a.threads);
    }
}

/* g·W to `to`, added to it if `sum`; then adds `added`, unless null. */
static void back(Context a, const bf16 *g, const Stored *w, bf16 *to, int sum, const Added *added) {
    Int8Rows *c = &a.int8;
    int64_t n = a.tokens;
    if (w->kind != INT8_ROWS) {
        stored_product(g, w, to, a.work, n, 1, sum, added, a.threads);
        return;
    }
    quantise_rows(g, w->scales, 0, 0, c->codes, c->steps, n, w->out, a.threads);
    int8_product(c->codes, c->steps, w->codes, 0, 0, 0, 0, sum ? c->product : to, c->work, n, w->out, w->in, 1,
                  int8_threads(n, w->in, a.threads));
    if (sum) add(to, c->product, to, n * w->in, a.threads);
    add_to_all(added, to, n, w->in, a.threads);
}

/* ∂x (tokens, width), unless null, from the gradients of the layers that have the input x and of their pairs; ∂B of the pairs, and u,
   which `of_a` needs. */
static void times_back(Context a, int count, const Stored *w, const Layer *grads, bf16 *grad_x, const Group *group, const bf16 *h,
                       bf16 *u, float *of_b) {
    Wide wide[group->count];
    int64_t parts = trained_pairs_shrink_back(group->pairs, group->scales, group->count, grads, w->in, h, u, of_b, a.factors,
                                              grad_x ? wide : 0, a.threads);
    Added added = {0, wide, parts, 0};
    for (int i = 0; grad_x && i < count; i++) back(a, grads[i].rows, w + i, grad_x, i > 0, i + 1 < count ? 0 : &added);
}

/* ∂A of the pairs, from u. */
static void of_a(Context a, const Group *group, const bf16 *u, const bf16 *x, int64_t width, float *found) {
    trained_pairs_of_a(group->pairs, group->count, u, x, width, found, a.factors, a.threads);
}

/* Zeros the padding tokens after the last row. */
static void blank(const Shape *s, bf16 *states) {
    int64_t last = s->starts[s->rows - 1] + s->lengths[s->rows - 1], width = s->heads * s->d;
    memset(states + last * width, 0, (s->tokens - last) * width * sizeof(bf16));
}

/* x (tokens, hidden) to y; cos and sin are (tokens, d). The pass is FORWARD or ALONE. */
void trained_block(const Weights *w, const Shape *s, const Group *groups, const bf16 *cos, const bf16 *sin, const bf16 *x, bf16 *y,
                   char *saved, char *scratch, int pass, int threads) {
    Workspace for_saved = {saved, 0}, for_scratch = {scratch, 0};
    Saved k = saved_in(&for_saved, w, s, groups, pass);
    Forward f = forward_in(&for_scratch, w, s, groups, &k, pass, threads);
    int64_t n = s->tokens, hidden = w->hidden, inner = w->inner, q = s->heads * s->d, kv = s->kv * s->d;
    Context a = {n, f.factors, f.work, f.int8, threads};
    const Layer qkv[] = {{k.q, q}, {k.k, kv}, {k.v, kv}}, gate_up[] = {{k.gate, inner}, {k.up, inner}};
    const Layer o[] = {{k.middle, hidden}}, down[] = {{y, hidden}};
    norm(x, w->first, w->epsilons[0], f.normed, k.first_rho, n, hidden, threads);
    times(a, f.normed, 3, &w->q, qkv, w->biases, groups + QKV, k.h[QKV]);
    if (w->heads[0]) norm(k.q, w->heads[0], w->head_epsilons[0], f.q, k.rho[0], n * s->heads, s->d, threads);
    if (w->heads[1]) norm(k.k, w->heads[1], w->head_epsilons[1], f.k, k.rho[1], n * s->kv, s->d, threads);
    rotate(f.q, cos, sin, n, s->heads, s->d / 2, 0, threads);
    rotate(f.k, cos, sin, n, s->kv, s->d / 2, 0, threads);
    blank(s, k.attended);
    attention_forward(s, f.q, f.k, k.v, k.attended, k.logs, (char *)f.work, least(threads, s->heads * s->rows));
    times(a, k.attended, 1, &w->o, o, 0, groups + O, k.h[O]);
    add_norm(x, k.middle, w->second, w->epsilons[1], f.normed, k.second_rho, n, hidden, threads);
    times(a, f.normed, 2, &w->gate, gate_up, 0, groups + GATE_UP, k.h[GATE_UP]);
    gated(k.gate, k.up, f.inner, n * inner, threads);
    times(a, f.inner, 1, &w->down, down, 0, groups + DOWN, k.h[DOWN]);
    add(k.middle, y, y, n * hidden, threads);
}

/* ∂L/∂y (tokens, hidden) to ∂L/∂x, unless `grad_x` is null, and, group by group, ∂A and ∂B of the pairs. Overwrites what was saved. */
void trained_block_backward(const Weights *w, const Shape *s, const Group *groups, const bf16 *cos, const bf16 *sin, const bf16 *x,
                            char *saved, const bf16 *grad, bf16 *grad_x, float *grad_a, float *grad_b, char *scratch, int threads) {
    Workspace for_saved = {saved, 0}, for_scratch = {scratch, 0};
    Saved k = saved_in(&for_saved, w, s, groups, BACKWARD);
    Backward b = backward_in(&for_scratch, w, s, groups, &k, threads);
    int64_t n = s->tokens, hidden = w->hidden, inner = w->inner, q = s->heads * s->d, kv = s->kv * s->d;
    Context a = {n, b.factors, b.work, b.int8, threads};
    float *as[GROUPS], *bs[GROUPS];
    for (int g = 0; g < GROUPS; g++) as[g] = grad_a, bs[g] = grad_b, grad_a += groups[g].of_a, grad_b += groups[g].of_b;

    times_back(a, 1, &w->down, (Layer[]){{(bf16 *)grad, hidden}}, b.inner, groups + DOWN, k.h[DOWN], b.u, bs[DOWN]);
    gated_backward(k.gate, k.up, b.inner, n * inner, threads);
    of_a(a, groups + DOWN, b.u, b.inner, inner, as[DOWN]);
    norm_again(k.middle, k.second_rho, w->second, b.normed, n, hidden, threads);
    times_back(a, 2, &w->gate, (Layer[]){{k.gate, inner}, {k.up, inner}}, b.grad, groups + GATE_UP, k.h[GATE_UP], b.u, bs[GATE_UP]);
    of_a(a, groups + GATE_UP, b.u, b.normed, hidden, as[GATE_UP]);
    bf16 *middle = k.middle; /* from here on its gradient */
    norm_backward_beside(b.grad, k.middle, k.second_rho, w->second, grad, middle, n, hidden, threads);

    Attention *at = &b.attention;
    times_back(a, 1, &w->o, (Layer[]){{middle, hidden}}, at->attended, groups + O, k.h[O], b.u, bs[O]);
    of_a(a, groups + O, b.u, k.attended, q, as[O]);
    if (w->heads[0]) norm_again(k.q, k.rho[0], w->heads[0], b.q, n * s->heads, s->d, threads);
    if (w->heads[0]) rotate(b.q, cos, sin, n, s->heads, s->d / 2, 0, threads);
    if (w->heads[1]) norm_again(k.k, k.rho[1], w->heads[1], b.k, n * s->kv, s->d, threads);
    if (w->heads[1]) rotate(b.k, cos, sin, n, s->kv, s->d / 2, 0, threads);
    blank(s, at->q);
    attention_backward(s, b.q, b.k, k.v, k.attended, k.logs, at->attended, at->q, at->k, at->v, at->sums, at->of_prefix,
                       (char *)b.work, least(threads, s->parts * s->groups));
    rotate(at->q, cos, sin, n, s->heads, s->d / 2, 1, threads);
    rotate(at->k, cos, sin, n, s->kv, s->d / 2, 1, threads);
    if (w->heads[0]) norm_backward(at->q, k.q, k.rho[0], w->heads[0], at->q, n * s->heads, s->d, threads);
    if (w->heads[1]) norm_backward(at->k, k.k, k.rho[1], w->heads[1], at->k, n * s->kv, s->d, threads);
    norm_again(x, k.first_rho, w->first, b.normed, n, hidden, threads);
    times_back(a, 3, &w->q, (Layer[]){{at->q, q}, {at->k, kv}, {at->v, kv}}, grad_x ? b.grad : 0, groups + QKV, k.h[QKV], b.u,
               bs[QKV]);
    of_a(a, groups + QKV, b.u, b.normed, hidden, as[QKV]);
    if (grad_x) norm_backward_beside(b.grad, x, k.first_rho, w->first, middle, grad_x, n, hidden, threads);
}
