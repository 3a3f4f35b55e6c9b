/* A decoder block with pairs, whole, in training and without gradients: two norms, attention over rows laid end to end, a gated
   MLP. All of its seven frozen weights have pairs, and q, k and v may have biases; rounding and order are those of the parts by
   themselves.

       x ──┬── norm ── q, k, v ── rotation ── attention ── o ──+──┬── norm ── gate, up ── silu(gate) ∘ up ── down ──+── y
           └───────────────────────────────────────────────────┘  └────────────────────────────────────────────────┘

   Backward runs through it from right to left, with the formulas of each part where it is (dense.c, trained_pairs.c, attention.c,
   elementwise.c). Where layers see one x, ∂x is the sum of theirs; where a state goes on beside a branch, ∂ of the state is what arrives
   from above and what the branch's norm gives: ∂x = ∂middle + norm′(∂q·W_q + ∂k·W_k + ∂v·W_v), for ∂middle, between the halves,
   = ∂y + norm′(∂gate·W_gate + ∂up·W_up), each W with its pair.

   Kept between the two passes are ρ of both norms, the turned q and k (where their heads are normed before, as they were then, and
   ρ of each head: they are normed and turned again), v, what attention gave and its log-sums, what stands between the halves, gate
   and up, and the h = x·Aᵀ of all pairs. */

#include "attention.h"
#include "int8_rows.h"
#include "dense.h"
#include "elementwise.h"
#include "stored.h"
#include "trained_pairs.h"

#include <string.h>

#define LINED 64 /* bytes: what everything begins at multiples of */
#define PIECE 24 /* tokens to which something is added at once */

enum { INWARD, OUTWARD, APART, DOWN, GROUPS }; /* layers that see the same x: q, k, v; o; gate, up; down */

typedef struct {
    Stored q, k, v, o, gate, up, down;
    const bf16 *biases[3];      /* of q, k and v, or none */
    const bf16 *heads[2];       /* the gains of the norms of q's heads and k's, or none */
    const bf16 *first, *second; /* the gains of the norms */
    float epsilons[2], head_epsilons[2];
    int64_t hidden, inner; /* the widths of x and of the MLP, multiples of 32 */
} Weights;

/* The pairs of layers that see the same x; the numbers are of kernels/cpu/trained_pairs: of h, of scratch, of the gradients. */
typedef struct {
    const Pair *pairs;
    const float *scales;
    int64_t count, numbers, forward, backward, woven, of_a, of_b;
} Group;

typedef struct {
    char *at;
    int64_t bytes; /* taken */
} Room;

static void *take(Room *room, int64_t bytes) {
    char *found = room->at + room->bytes;
    room->bytes += (bytes + LINED - 1) / LINED * LINED;
    return found;
}

static bf16 *take_rows(Room *room, int64_t tokens, int64_t width) { return take(room, tokens * width * (int64_t)sizeof(bf16)); }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct {
    float *first_rho, *second_rho, *logs, *rho[2];
    bf16 *q, *k, *v, *attended, *middle, *gate, *up, *h[GROUPS];
    int64_t apart; /* bytes of gate and up, one behind the other */
} Kept;

/* What a pass is: without gradients nothing that is kept is wanted afterwards. */
enum { FORWARD, BACKWARD, ALONE };

/* In a pass ALONE gate and up come where q, k, v and what attention gave were. */
static Kept kept_in(Room *room, const Weights *w, const Shape *s, const Group *groups, int pass) {
    Kept k;
    int64_t n = s->tokens;
    k.first_rho = take(room, n * (int64_t)sizeof(float));
    k.second_rho = take(room, n * (int64_t)sizeof(float));
    k.logs = take(room, s->heads * n * (int64_t)sizeof(float));
    for (int i = 0; i < 2; i++) k.rho[i] = w->heads[i] ? take(room, (i ? s->kv : s->heads) * n * (int64_t)sizeof(float)) : 0;
    k.middle = take_rows(room, n, w->hidden);
    Room later = *room;
    k.q = take_rows(room, n, s->heads * s->d);
    k.k = take_rows(room, n, s->kv * s->d);
    k.v = take_rows(room, n, s->kv * s->d);
    k.attended = take_rows(room, n, s->heads * s->d);
    if (pass != ALONE) later = *room;
    k.apart = -later.bytes;
    k.gate = take_rows(&later, n, w->inner);
    k.up = take_rows(&later, n, w->inner);
    k.apart += later.bytes;
    room->bytes = larger(room->bytes, later.bytes);
    for (int g = 0; g < GROUPS; g++) k.h[g] = take_rows(room, 1, groups[g].numbers);
    return k;
}

/* Bytes that are kept. */
int64_t trained_block_kept(const Weights *w, const Shape *s, const Group *groups, int pass) {
    Room room = {0, 0};
    kept_in(&room, w, s, groups, pass);
    return room.bytes;
}

static int least(int threads, int64_t parts) { return parts < threads ? (int)parts : threads; }

/* Bytes in which one product, or one attention, works, of those that a block has. */
static int64_t work(const Weights *w, const Shape *s, int threads, int backward) {
    int64_t q = s->heads * s->d, kv = s->kv * s->d, parts = backward ? s->parts * s->groups : s->heads * s->rows;
    int64_t most = least(threads, parts) * attention_room(s);
    const int64_t widths[] = {q, kv, w->inner};
    for (int i = 0; i < 3; i++) {
        most = larger(most, dense_scratch(w->hidden, widths[i], threads));
        most = larger(most, dense_scratch(widths[i], w->hidden, threads));
    }
    return most;
}

/* Numbers of scratch of one group's pairs, whose factors are laid out while a product works. */
static int64_t factors(const Group *groups, int backward) {
    int64_t most = 0;
    for (int g = 0; g < GROUPS; g++)
        most = larger(most, backward ? larger(groups[g].backward, groups[g].woven) : groups[g].forward);
    return most;
}

/* What rows are coded to for weights whose products run in int8, and where such a product stands until it is added to another. */
typedef struct {
    uint8_t *codes, *work;
    float *steps;
    int64_t *columns;
    bf16 *apart, *product;
    uint16_t *peaks;
} Coding;

static Coding coding_in(Room *room, const Weights *w, const Shape *s, int threads, int backward) {
    Coding c = {0};
    const Stored *layers[] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->up, &w->down};
    int64_t widest = 0;
    for (int i = 0; i < 7; i++)
        if (layers[i]->kind == CODED) widest = larger(widest, larger(layers[i]->in, layers[i]->out));
    if (!widest) return c;
    c.codes = take(room, s->tokens * widest);
    c.work = take(room, threads * coded_scratch(widest));
    c.steps = take(room, s->tokens * (int64_t)sizeof(float));
    c.columns = take(room, LOUD * (int64_t)sizeof(int64_t));
    c.apart = take_rows(room, s->tokens, LOUD);
    if (backward) c.product = take_rows(room, s->tokens, w->hidden);
    c.peaks = take(room, widest * (int64_t)sizeof(uint16_t));
    return c;
}

/* Room for the turned q and k beside those that are kept, where they are normed before; else these themselves. */
static bf16 *turned_in(Room *room, const Weights *w, const Shape *s, int which, bf16 *kept) {
    return w->heads[which] ? take_rows(room, s->tokens, (which ? s->kv : s->heads) * s->d) : kept;
}

typedef struct {
    bf16 *normed, *inner, *q, *k, *factors;
    uint8_t *work;
    Coding coding;
} Forward;

static Forward forward_in(Room *room, const Weights *w, const Shape *s, const Group *groups, const Kept *kept, int pass,
                          int threads) {
    Forward f;
    f.q = turned_in(room, w, s, 0, kept->q);
    f.k = turned_in(room, w, s, 1, kept->k);
    f.normed = take_rows(room, s->tokens, w->hidden);
    f.inner = pass == ALONE ? kept->gate : take_rows(room, s->tokens, w->inner);
    f.work = take(room, work(w, s, threads, 0));
    f.factors = take_rows(room, 1, factors(groups, 0));
    f.coding = coding_in(room, w, s, threads, 0);
    return f;
}

/* The gradients with respect to q, k, v, and those of attention's result, which are gone when the block's are there. */
typedef struct {
    bf16 *attended, *q, *k, *v;
    float *sums, *of_prefix;
} Attention;

static void states_in(Room *room, const Shape *s, Attention *a) {
    a->attended = take_rows(room, s->tokens, s->heads * s->d);
    a->q = take_rows(room, s->tokens, s->heads * s->d);
    a->k = take_rows(room, s->tokens, s->kv * s->d);
    a->v = take_rows(room, s->tokens, s->kv * s->d);
}

static void sums_in(Room *room, const Shape *s, Attention *a) {
    a->sums = take(room, 2 * s->parts * s->tokens * s->d * (int64_t)sizeof(float));
    a->of_prefix = take(room, 2 * s->parts * (s->groups - 1) * s->prefix * s->d * (int64_t)sizeof(float));
}

/* In `apart` where there is room for all that `lay` takes, else in `room`. */
static void lay_in(void (*lay)(Room *, const Shape *, Attention *), Room *apart, int64_t bytes, Room *room, const Shape *s,
                   Attention *a) {
    Room tried = *apart;
    lay(&tried, s, a);
    if (tried.bytes <= bytes) *apart = tried;
    else lay(room, s, a);
}

/* `inner` is used up before `normed` and `grad` are written; q and k are wanted when these are not. */
typedef struct {
    bf16 *inner, *normed, *grad, *u, *q, *k, *factors;
    uint8_t *work;
    Coding coding;
    Attention attention; /* what there is room for where gate and up were */
} Backward;

static Backward backward_in(Room *room, const Weights *w, const Shape *s, const Group *groups, const Kept *kept, int threads) {
    Backward b;
    int64_t numbers = 0;
    for (int g = 0; g < GROUPS; g++) numbers = larger(numbers, groups[g].numbers);
    Room first = *room, between = *room;
    b.inner = take_rows(&first, s->tokens, w->inner);
    b.q = turned_in(&between, w, s, 0, kept->q);
    b.k = turned_in(&between, w, s, 1, kept->k);
    b.normed = take_rows(room, s->tokens, w->hidden);
    b.grad = take_rows(room, s->tokens, w->hidden);
    room->bytes = larger(room->bytes, larger(first.bytes, between.bytes));
    b.u = take_rows(room, 1, numbers);
    b.work = take(room, work(w, s, threads, 1));
    b.factors = take_rows(room, 1, factors(groups, 1));
    b.coding = coding_in(room, w, s, threads, 1);
    Room apart = {(char *)kept->gate, 0};
    lay_in(states_in, &apart, kept->apart, room, s, &b.attention);
    lay_in(sums_in, &apart, kept->apart, room, s, &b.attention);
    return b;
}

/* Bytes of scratch of a pass. */
int64_t trained_block_scratch(const Weights *w, const Shape *s, const Group *groups, int pass, int threads) {
    Room room = {0, 0}, kept = {0, 0};
    Kept k = kept_in(&kept, w, s, groups, pass);
    if (pass == BACKWARD) backward_in(&room, w, s, groups, &k, threads);
    else forward_in(&room, w, s, groups, &k, pass, threads);
    return room.bytes;
}

/* y = a + b of `count` numbers, a multiple of 16; y may be one of them. */
static void add(const bf16 *a, const bf16 *b, bf16 *y, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) put(y + i, _mm512_add_ps(wide(a + i), wide(b + i)));
}

/* What is added to all rows of y, after a product that knows nothing of it; or nothing. */
static void add_to_all(const Added *added, bf16 *y, int64_t tokens, int64_t width, int threads) {
    if (!added) return;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t += PIECE) add_to_rows(added, y, width, t, t + PIECE < tokens ? t + PIECE : tokens);
}

/* What a product with a frozen weight, or with pairs, is asked with. */
typedef struct {
    int64_t tokens;
    bf16 *factors;
    uint8_t *work;
    Coding coding;
    int threads;
} Asked;

/* The y's of layers that see the same x, with biases, or none, and with their pairs, whose h it keeps. x is coded once for those
   that multiply codes. */
static void times(Asked a, const bf16 *x, int count, const Stored *w, const Layer *ys, const bf16 *const *biases, const Group *group,
                  bf16 *h) {
    Coding *c = &a.coding;
    int64_t n = a.tokens, in = w->in, apart = coded_apart(in);
    Wide wide[group->count];
    trained_pairs_shrink(group->pairs, group->scales, group->count, ys, x, in, h, a.factors, wide, a.threads);
    for (int i = 0, coded = 0; i < count; i++, w++) {
        bf16 *y = ys[i].rows;
        Added added = {biases ? biases[i] : 0, wide, group->count, i};
        if (w->kind != CODED) {
            stored_product(x, w, y, a.work, n, 0, 0, &added, a.threads);
            continue;
        }
        if (!coded) {
            loud_columns(x, c->peaks, c->columns, c->apart, n, in, apart, a.threads);
            code_rows(x, 0, c->columns, apart, c->codes, c->steps, n, in, a.threads);
            coded = 1;
        }
        coded_product(c->codes, c->steps, w->codes, w->scales, c->columns, c->apart, apart, y, c->work, n, in, w->out, 0,
                      coded_threads(n, w->out, a.threads));
        add_to_all(&added, y, n, w->out, a.threads);
    }
}

/* g·W, or that added to what is there, and then what is `added`, or nothing. */
static void back(Asked a, const bf16 *g, const Stored *w, bf16 *to, int sum, const Added *added) {
    Coding *c = &a.coding;
    int64_t n = a.tokens;
    if (w->kind != CODED) {
        stored_product(g, w, to, a.work, n, 1, sum, added, a.threads);
        return;
    }
    code_rows(g, w->scales, 0, 0, c->codes, c->steps, n, w->out, a.threads);
    coded_product(c->codes, c->steps, w->codes, 0, 0, 0, 0, sum ? c->product : to, c->work, n, w->out, w->in, 1,
                  coded_threads(n, w->in, a.threads));
    if (sum) add(to, c->product, to, n * w->in, a.threads);
    add_to_all(added, to, n, w->in, a.threads);
}

/* ∂x (tokens, width) from the gradients of layers that see it, if it is wanted, with that by way of their pairs; their ∂B, and u,
   which is for `of_a`. */
static void times_back(Asked a, int count, const Stored *w, const Layer *grads, bf16 *grad_x, const Group *group, const bf16 *h,
                       bf16 *u, float *of_b) {
    Wide wide[group->count];
    int64_t parts = trained_pairs_shrink_back(group->pairs, group->scales, group->count, grads, w->in, h, u, of_b, a.factors,
                                              grad_x ? wide : 0, a.threads);
    Added added = {0, wide, parts, 0};
    for (int i = 0; grad_x && i < count; i++) back(a, grads[i].rows, w + i, grad_x, i > 0, i + 1 < count ? 0 : &added);
}

/* ∂A of the pairs. */
static void of_a(Asked a, const Group *group, const bf16 *u, const bf16 *x, int64_t width, float *found) {
    trained_pairs_of_a(group->pairs, group->count, u, x, width, found, a.factors, a.threads);
}

/* Zeros for the tokens behind the last row. */
static void blank(const Shape *s, bf16 *states) {
    int64_t last = s->starts[s->rows - 1] + s->lengths[s->rows - 1], width = s->heads * s->d;
    memset(states + last * width, 0, (s->tokens - last) * width * sizeof(bf16));
}

/* x (tokens, hidden) to y; cos and sin are (tokens, d). The pass is FORWARD or ALONE. */
void trained_block(const Weights *w, const Shape *s, const Group *groups, const bf16 *cos, const bf16 *sin, const bf16 *x, bf16 *y,
                   char *kept, char *scratch, int pass, int threads) {
    Room for_kept = {kept, 0}, for_scratch = {scratch, 0};
    Kept k = kept_in(&for_kept, w, s, groups, pass);
    Forward f = forward_in(&for_scratch, w, s, groups, &k, pass, threads);
    int64_t n = s->tokens, hidden = w->hidden, inner = w->inner, q = s->heads * s->d, kv = s->kv * s->d;
    Asked a = {n, f.factors, f.work, f.coding, threads};
    const Layer inward[] = {{k.q, q}, {k.k, kv}, {k.v, kv}}, apart[] = {{k.gate, inner}, {k.up, inner}};
    const Layer outward[] = {{k.middle, hidden}}, down[] = {{y, hidden}};
    norm(x, w->first, w->epsilons[0], f.normed, k.first_rho, n, hidden, threads);
    times(a, f.normed, 3, &w->q, inward, w->biases, groups + INWARD, k.h[INWARD]);
    if (w->heads[0]) norm(k.q, w->heads[0], w->head_epsilons[0], f.q, k.rho[0], n * s->heads, s->d, threads);
    if (w->heads[1]) norm(k.k, w->heads[1], w->head_epsilons[1], f.k, k.rho[1], n * s->kv, s->d, threads);
    turn(f.q, cos, sin, n, s->heads, s->d / 2, 0, threads);
    turn(f.k, cos, sin, n, s->kv, s->d / 2, 0, threads);
    blank(s, k.attended);
    attention_forward(s, f.q, f.k, k.v, k.attended, k.logs, (char *)f.work, least(threads, s->heads * s->rows));
    times(a, k.attended, 1, &w->o, outward, 0, groups + OUTWARD, k.h[OUTWARD]);
    add_norm(x, k.middle, w->second, w->epsilons[1], f.normed, k.second_rho, n, hidden, threads);
    times(a, f.normed, 2, &w->gate, apart, 0, groups + APART, k.h[APART]);
    gated(k.gate, k.up, f.inner, n * inner, threads);
    times(a, f.inner, 1, &w->down, down, 0, groups + DOWN, k.h[DOWN]);
    add(k.middle, y, y, n * hidden, threads);
}

/* From ∂L/∂y (tokens, hidden) to ∂L/∂x, where that is given a place, and, group by group, ∂A and ∂B of the pairs. Uses up what was
   kept. */
void trained_block_backward(const Weights *w, const Shape *s, const Group *groups, const bf16 *cos, const bf16 *sin, const bf16 *x,
                            char *kept, const bf16 *grad, bf16 *grad_x, float *grad_a, float *grad_b, char *scratch, int threads) {
    Room for_kept = {kept, 0}, for_scratch = {scratch, 0};
    Kept k = kept_in(&for_kept, w, s, groups, BACKWARD);
    Backward b = backward_in(&for_scratch, w, s, groups, &k, threads);
    int64_t n = s->tokens, hidden = w->hidden, inner = w->inner, q = s->heads * s->d, kv = s->kv * s->d;
    Asked a = {n, b.factors, b.work, b.coding, threads};
    float *as[GROUPS], *bs[GROUPS];
    for (int g = 0; g < GROUPS; g++) as[g] = grad_a, bs[g] = grad_b, grad_a += groups[g].of_a, grad_b += groups[g].of_b;

    times_back(a, 1, &w->down, (Layer[]){{(bf16 *)grad, hidden}}, b.inner, groups + DOWN, k.h[DOWN], b.u, bs[DOWN]);
    gated_backward(k.gate, k.up, b.inner, n * inner, threads);
    of_a(a, groups + DOWN, b.u, b.inner, inner, as[DOWN]);
    norm_again(k.middle, k.second_rho, w->second, b.normed, n, hidden, threads);
    times_back(a, 2, &w->gate, (Layer[]){{k.gate, inner}, {k.up, inner}}, b.grad, groups + APART, k.h[APART], b.u, bs[APART]);
    of_a(a, groups + APART, b.u, b.normed, hidden, as[APART]);
    bf16 *middle = k.middle; /* and from here on its gradient */
    norm_backward_beside(b.grad, k.middle, k.second_rho, w->second, grad, middle, n, hidden, threads);

    Attention *at = &b.attention;
    times_back(a, 1, &w->o, (Layer[]){{middle, hidden}}, at->attended, groups + OUTWARD, k.h[OUTWARD], b.u, bs[OUTWARD]);
    of_a(a, groups + OUTWARD, b.u, k.attended, q, as[OUTWARD]);
    if (w->heads[0]) norm_again(k.q, k.rho[0], w->heads[0], b.q, n * s->heads, s->d, threads);
    if (w->heads[0]) turn(b.q, cos, sin, n, s->heads, s->d / 2, 0, threads);
    if (w->heads[1]) norm_again(k.k, k.rho[1], w->heads[1], b.k, n * s->kv, s->d, threads);
    if (w->heads[1]) turn(b.k, cos, sin, n, s->kv, s->d / 2, 0, threads);
    blank(s, at->q);
    attention_backward(s, b.q, b.k, k.v, k.attended, k.logs, at->attended, at->q, at->k, at->v, at->sums, at->of_prefix,
                       (char *)b.work, least(threads, s->parts * s->groups));
    turn(at->q, cos, sin, n, s->heads, s->d / 2, 1, threads);
    turn(at->k, cos, sin, n, s->kv, s->d / 2, 1, threads);
    if (w->heads[0]) norm_backward(at->q, k.q, k.rho[0], w->heads[0], at->q, n * s->heads, s->d, threads);
    if (w->heads[1]) norm_backward(at->k, k.k, k.rho[1], w->heads[1], at->k, n * s->kv, s->d, threads);
    norm_again(x, k.first_rho, w->first, b.normed, n, hidden, threads);
    times_back(a, 3, &w->q, (Layer[]){{at->q, q}, {at->k, kv}, {at->v, kv}}, grad_x ? b.grad : 0, groups + INWARD, k.h[INWARD], b.u,
               bs[INWARD]);
    of_a(a, groups + INWARD, b.u, b.normed, hidden, as[INWARD]);
    if (grad_x) norm_backward_beside(b.grad, x, k.first_rho, w->first, middle, grad_x, n, hidden, threads);
}
