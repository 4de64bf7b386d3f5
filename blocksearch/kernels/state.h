/* A state of a found cell, as the loops see it: what it is the sum of, what leaves it, and one image of it.
 *
 * Bound by memory between images, by arithmetic within one: an image of a state is put together, is
 * activated and read by every op that leaves it while it is in the cache. A state is the sum of
 * terms scale z + shift, the BatchNorms of what arrives there.
 *
 * An op that leaves is a pool, or a unit: its columns are the activated state, a depthwise
 * convolution of it, 2x2 averages of it or two grids of its pixels; its output is their product with
 * pointwise weights, or (CONCAT) the state and its depthwise convolution side by side.
 */
#ifndef STATE_H
#define STATE_H
#include "depthwise.h"
#include "norm.h"
#include "pointwise.h"
#include "pool.h"

enum { SKIP, MAX_POOL, AVG_POOL, UNIT, CONCAT };       /* what an op that leaves is */
enum { PLAIN, DEPTHWISE, AVERAGES, GRIDS };            /* what the columns of a unit are */

typedef struct {
    const REAL *z;             /* (B, H, W, C), `ld` numbers from pixel to pixel */
    const REAL *scale, *shift; /* (C), or NULL for 1 and 0 */
    const REAL *mean, *rstd;   /* (C) of z, or NULL without a BatchNorm */
    const REAL *gamma;         /* (C), or NULL for 1 */
    REAL *dgamma, *dbeta;      /* (C): gradients */
    REAL *coef;                /* (3, C): see norm.h */
    long ld;
} Term;

typedef struct {
    const REAL *dw, *pw;        /* weights (C, k, k) and (N, K), each or NULL */
    const REAL *gamma, *beta;   /* (N), or NULL for 1 and 0 */
    REAL *z;                    /* (B, H', W', N) */
    REAL *mean, *rstd;          /* (N) of z, or NULL without a BatchNorm */
    REAL *scale, *shift;        /* (N): the BatchNorm of z as an affine map */
    const REAL *g, *coef;       /* gradient on z is coef[0] g + coef[1] z + coef[2], or g where NULL */
    REAL *gdw, *gpw;            /* gradients of the weights, added to */
    REAL *running_mean, *running_var; /* (N), moved towards those of z; or NULL */
    long ldg, kind, columns, inputs, outputs, kernel, dilation, stride; /* K inputs, N outputs */
    double eps, momentum;
} Leaving;

typedef struct {
    long batch, height, width, channels, pad, threads;
} Image;

/* What a pass has in hand: the state and its image, activated with a border, in whole vectors. */
typedef struct {
    const Image *image;
    long C, W, pixels; /* channels in whole vectors, width with border, pixels without */
    REAL *raw, *in;
} State;

INLINE size_t bordered(const Image *s) { return (size_t)(s->height + 2 * s->pad) * (s->width + 2 * s->pad); }
INLINE long out_width(const Image *s, const Leaving *op) { return halved(s->width, op->stride); }
INLINE long out_height(const Image *s, const Leaving *op) { return halved(s->height, op->stride); }
INLINE REAL *pixel(const State *s, int y, int x) { return s->in + ((y + s->image->pad) * s->W + x + s->image->pad) * s->C; }

/* Numbers of a tile of an op, in whole vectors and a little more, since parts are stored as wholes. */
static size_t tile_size(const Image *s, const Leaving *op) {
    long columns = padded(op->inputs) + padded(op->outputs) + padded(s->channels);
    return (size_t)tile_rows(out_width(s, op)) * (out_width(s, op) + s->width) * columns + 2 * LANES;
}

static int reads_activated(const Leaving *op) { return op->kind == UNIT || op->kind == CONCAT; }
static int is_pool(const Leaving *op) { return op->kind == MAX_POOL || op->kind == AVG_POOL; }

/* Weights as the loops read them: dw (k k, C) and its mirror image; pw (K, N) and (N, K). */
typedef struct {
    REAL *dw, *mirror, *pw, *back;
} Weights;

static size_t weights_size(const Leaving *op, long C) {
    return 2 * op->kernel * op->kernel * C + op->inputs * padded(op->outputs) + op->outputs * padded(op->inputs);
}

static Weights lay_out(const Leaving *op, long C, REAL *at) {
    long kk = op->kernel * op->kernel;
    REAL *mirror = at + kk * C, *pw = mirror + kk * C;
    return (Weights){at, mirror, pw, pw + op->inputs * padded(op->outputs)};
}

static Weights pack_weights(const Leaving *op, long channels, REAL *at) {
    long C = padded(channels), kk = op->kernel * op->kernel, K = padded(op->inputs), N = padded(op->outputs);
    Weights w = lay_out(op, C, at);
    memset(at, 0, weights_size(op, C) * sizeof(REAL));
    for (long c = 0; c < channels && op->dw; c++)
        for (long t = 0; t < kk; t++) w.dw[t * C + c] = w.mirror[(kk - 1 - t) * C + c] = op->dw[c * kk + t];
    for (long o = 0; o < op->outputs && op->pw; o++)
        for (long i = 0; i < op->inputs; i++)
            w.pw[i * N + o] = w.back[o * K + i] = op->pw[o * op->inputs + i];
    return w;
}

static size_t all_weights(const Leaving *ops, int m, long C) {
    size_t total = 0;
    for (int k = 0; k < m; k++) total += weights_size(ops + k, C);
    return total;
}

/* sum = bias + sum_k scale[k] z[k] for W pixels of one row and one vector of channels. */
INLINE void sum_of_terms(const Term *terms, int n, long first, long c, int left, REAL *sum, long C, long W) {
    vec bias = {0}, one = (vec){0} + (REAL)1;
    for (int k = 0; k < n; k++)
        if (terms[k].scale) bias += load_some(terms[k].shift + c, left);
    int k = 0;
    do {
        const Term *t = terms + k, *u = t + 1;
        const REAL *z = t->z + first * t->ld + c;
        if (k) bias = (vec){0};
        if (!n)
            for (long x = 0; x < W; x++) store(sum + x * C, bias);
        else if (k + 1 < n) {
            const REAL *y = u->z + first * u->ld + c;
            vec a = t->scale ? load_some(t->scale + c, left) : one, b = u->scale ? load_some(u->scale + c, left) : one;
            for (long x = 0; x < W; x++) {
                vec v = a * load_some(z + x * t->ld, left) + b * load_some(y + x * u->ld, left);
                store(sum + x * C, v + (k ? load(sum + x * C) : bias));
            }
        } else {
            vec a = t->scale ? load_some(t->scale + c, left) : one;
            for (long x = 0; x < W; x++)
                store(sum + x * C, a * load_some(z + x * t->ld, left) + (k ? load(sum + x * C) : bias));
        }
        k += 2;
    } while (k < n);
}

/* One image of the state: the sum of its terms, in `raw` (one row, or where `whole` all), and where `out`
 * keeps it; activated in `in`. */
static void assemble(const State *s, const Term *terms, int n, int b, REAL *out, long ldo, int whole, int activated) {
    const Image *image = s->image;
    long C = s->C, W = image->width;
    if (activated && image->pad) memset(s->in, 0, bordered(image) * C * sizeof(REAL));
    for (long y = 0; y < image->height; y++) {
        long first = (b * image->height + y) * W;
        REAL *raw = s->raw + (whole ? y * W * C : 0), *to = out ? out + first * ldo : NULL, *active = pixel(s, y, 0);
        for (long c = 0; c < C; c += LANES) {
            int left = image->channels - c;
            if (left >= LANES) sum_of_terms(terms, n, first, c, LANES, raw + c, C, W);
            else sum_of_terms(terms, n, first, c, left, raw + c, C, W);
            if (activated)
                for (long x = 0; x < W; x++) store(active + x * C + c, relu(load(raw + x * C + c)));
            if (to && left >= LANES)
                for (long x = 0; x < W; x++) store(to + x * ldo + c, load(raw + x * C + c));
            else if (to)
                for (long x = 0; x < W; x++) store_part(to + x * ldo + c, load(raw + x * C + c), left);
        }
    }
}

/* The columns of a unit for output rows y to y + rows: where they stand, and how far apart. */
static const REAL *columns(const State *s, const Leaving *op, const Weights *w, int y, int rows, REAL *tile, long *ld) {
    const Image *image = s->image;
    long C = s->C, Wo = out_width(image, op), H = image->height, W = image->width;
    int lead = image->pad - op->dilation * (op->kernel - 1) / 2;
    *ld = C;
    if (op->columns == PLAIN && !image->pad) return s->in + y * W * C;
    for (int r = 0; r < rows; r++, y++) {
        REAL *to = tile + r * Wo * C;
        if (op->columns == PLAIN) memcpy(to, pixel(s, y, 0), W * C * sizeof(REAL));
        else if (op->columns == DEPTHWISE)
            taps(s->in + ((y * op->stride + lead) * s->W + lead) * C, s->W * C, w->dw, to, Wo, op->stride, C,
                 op->kernel, op->dilation);
        else if (op->columns == AVERAGES)
            for (int x = 0; x < Wo; x++) {
                int down = 2 * y + 1 < H, right = 2 * x + 1 < W;
                const REAL *p = pixel(s, 2 * y, 2 * x);
                for (long c = 0; c < C; c += LANES) {
                    vec v = load(p + c);
                    if (right) v += load(p + C + c);
                    if (down) v += load(p + s->W * C + c);
                    if (down && right) v += load(p + (s->W + 1) * C + c);
                    store(to + x * C + c, v * ((REAL)1 / ((1 + down) * (1 + right))));
                }
            }
        else {
            long K = image->channels;
            *ld = padded(2 * K);
            to = tile + r * Wo * *ld;
            for (int x = 0; x < Wo; x++) {
                const REAL *p = pixel(s, 2 * y, 2 * x);
                int inside = 2 * y + 1 < H && 2 * x + 1 < W;
                for (long c = 0; c < C; c += LANES) store(to + x * *ld + c, load(p + c));
                for (long c = 0; c < C; c += LANES)
                    store(to + x * *ld + K + c, inside ? load(p + (s->W + 1) * C + c) : (vec){0});
            }
        }
    }
    return tile;
}

#endif
