/* A found cell, state by state: one pass over a state computes it and all that its ops put out.
 *
 * Bound by memory between images, by arithmetic within one: an image of a state is put together, is
 * activated and read by every op that leaves it while it is in the cache. A state is the sum of
 * terms scale z + shift, the BatchNorms of what arrives there. Backward, the gradient on a state is
 * complete once all ops that leave it have gone; in the same pass the sums are taken from which the
 * BatchNorms of what arrives have their gradients.
 *
 * An op that leaves is a pool, or a unit: its columns are the activated state, a depthwise
 * convolution of it, 2x2 averages of it or two grids of its pixels; its output is their product with
 * pointwise weights, or (CONCAT) the state and its depthwise convolution side by side.
 */
#ifndef FOUND_CELL_H
#define FOUND_CELL_H
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
    long ldg, kind, columns, inputs, outputs, kernel, dilation, stride; /* K inputs, N outputs */
    double eps;
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
INLINE int tile_rows(int width) { return width >= TILE_PIXELS ? 1 : TILE_PIXELS / width; }
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

/* Adds the gradient `gc` (rows of ld) on the averages or grids of a tile to that on the activated image. */
static void spread(const State *s, const Leaving *op, int y, int rows, const REAL *gc, long ld, REAL *ga) {
    const Image *image = s->image;
    long C = s->C, Wo = out_width(image, op), H = image->height, W = image->width, K = image->channels;
    for (int r = 0; r < rows; r++, y++)
        for (int x = 0; x < Wo; x++) {
            const REAL *g = gc + (r * Wo + x) * ld;
            int down = 2 * y + 1 < H, right = 2 * x + 1 < W;
            REAL *to = ga + (2 * y * W + 2 * x) * C, *odd = to + (W + 1) * C;
            for (long c = 0; c < C; c += LANES) {
                vec v = load_some(g + c, K - c);
                if (op->columns == GRIDS) {
                    store(to + c, load(to + c) + v);
                    if (down && right) store(odd + c, load(odd + c) + load_some(g + K + c, K - c));
                    continue;
                }
                v *= (REAL)1 / ((1 + down) * (1 + right));
                store(to + c, load(to + c) + v);
                if (right) store(to + C + c, load(to + C + c) + v);
                if (down) store(to + W * C + c, load(to + W * C + c) + v);
                if (down && right) store(odd + c, load(odd + c) + v);
            }
        }
}

/* One tile of an op's output. */
static void put_out(const State *s, const Leaving *op, const Weights *w, int y, int rows, REAL *z, REAL *tile) {
    long n = rows * out_width(s->image, op), N = op->outputs, ldo = padded(N), ld, C = s->C, K = s->image->channels;
    REAL *out = tile + n * padded(op->inputs) + LANES;
    if (is_pool(op)) {
        for (int r = 0; r < rows; r++)
            pool_row(s->raw, op->kind == MAX_POOL, y + r, op->stride, s->image->height, s->image->width, C, out,
                     tile + r * out_width(s->image, op) * C);
        store_rows(tile, C, z, n, N);
        return;
    }
    const REAL *a = columns(s, op, w, y, rows, tile, &ld);
    if (op->kind == UNIT) {
        int whole = N == ldo;
        product(a, ld, w->pw, whole ? z : out, ldo, n, op->inputs, ldo);
        if (!whole) store_rows(out, ldo, z, n, N);
        return;
    }
    for (int r = 0; r < rows; r++) { /* CONCAT, stride 1 */
        long W = s->image->width;
        for (long x = 0; x < W; x++) {
            REAL *to = out + (r * W + x) * ldo;
            for (long c = 0; c < C; c += LANES) store(to + c, load(pixel(s, y + r, x) + c));
            for (long c = 0; c < C; c += LANES) store_some(to + K + c, load(a + (r * W + x) * C + c), K - c);
        }
    }
    store_rows(out, ldo, z, n, N);
}

/* The state from its terms, kept in `out` unless that is NULL, and what every op puts out, with the
 * BatchNorm of that as an affine map. */
EXPORT int forward_state(const Term *terms, int n, const Leaving *ops, int m, REAL *out, long ldo, Image image) {
    long C = padded(image.channels), pixels = image.height * image.width;
    size_t room = 0, tile = 0, *at = calloc(m + 1, sizeof(size_t));
    int activated = 0, pools = 0;
    for (int k = 0; k < m && at; k++) {
        at[k + 1] = at[k] + 2 * ops[k].outputs;
        if (tile_size(&image, ops + k) > tile) tile = tile_size(&image, ops + k);
        activated |= reads_activated(ops + k);
        pools |= is_pool(ops + k);
    }
    room = (pixels + (activated ? bordered(&image) : 0)) * C + 2 * LANES + tile;
    REAL *memory = malloc((all_weights(ops, m, C) + 1) * sizeof(REAL));
    Weights *weights = malloc((m + 1) * sizeof(Weights));
    REAL *sums = at ? calloc(image.batch * at[m] + 1, sizeof(REAL)) : NULL;
    int failed = !at || !memory || !weights || !sums;
    long images = failed ? 0 : image.batch;
    for (size_t k = 0, used = 0; k < (size_t)m && !failed; used += weights_size(ops + k, C), k++)
        weights[k] = pack_weights(ops + k, image.channels, memory + used);
#pragma omp parallel for schedule(static) num_threads(image.threads) reduction(| : failed)
    for (long b = 0; b < images; b++) {
        State s = {&image, C, image.width + 2 * image.pad, pixels, scratch(room), NULL};
        if (!s.raw) {
            failed = 1;
            continue;
        }
        s.in = s.raw + pixels * C;
        assemble(&s, terms, n, b, out, ldo, pools, activated);
        REAL *tiles = s.in + (activated ? bordered(&image) * C + 2 * LANES : 0);
        for (int k = 0; k < m; k++) {
            const Leaving *op = ops + k;
            long Ho = out_height(&image, op), Wo = out_width(&image, op), N = op->outputs;
            REAL *first = op->z + b * Ho * Wo * N;
            int step = tile_rows(Wo);
            for (long y = 0; y < Ho; y += step) {
                int rows = y + step <= Ho ? step : Ho - y;
                REAL *z = first + y * Wo * N;
                put_out(&s, op, weights + k, y, rows, z, tiles);
                if (op->mean) add_moments(z, N, first, sums + b * at[m] + at[k], rows * Wo, N);
            }
        }
    }
    for (int k = 0; k < m && !failed; k++) {
        const Leaving *op = ops + k;
        long count = out_height(&image, op) * out_width(&image, op);
        if (!op->mean) continue;
        moments(op->z, sums + at[k], at[m], image.batch, count, op->eps, op->outputs, op->mean, op->rstd);
        for (long c = 0; c < op->outputs; c++) {
            op->scale[c] = op->rstd[c] * (op->gamma ? op->gamma[c] : 1);
            op->shift[c] = (op->beta ? op->beta[c] : 0) - op->mean[c] * op->scale[c];
        }
    }
    free(at);
    free(sums);
    free(weights);
    free(memory);
    return failed;
}

/* What a thread works with backward, beside the state: gradients on the state and on its activation,
 * gradients of depthwise outputs with a border, and tiles. */
typedef struct {
    REAL *g, *active, *up, *gz, *gc, *tile;
} Gradients;

/* Where the gradient on the depthwise output (y, 0) stands in `up`, which has the border that its taps read. */
INLINE REAL *upward(const State *s, const Leaving *op, const Gradients *to, long y) {
    return to->up + ((y + s->image->pad) * (out_width(s->image, op) + 2 * s->image->pad) + s->image->pad) * s->C;
}

/* One tile of the gradient through a unit: of its weights, and on its columns. */
static void tile_back(const State *s, const Leaving *op, const Weights *w, const Weights *gw, long y, int rows,
                      const Gradients *to) {
    const Image *image = s->image;
    long C = s->C, K = image->channels, N = padded(op->outputs), W = image->width, Wo = out_width(image, op), n = rows * Wo, ld;
    long wide = padded(op->inputs), row = (Wo + 2 * image->pad) * C;
    if (op->kind == CONCAT) {
        for (long x = 0; x < n; x++)
            for (long c = 0; c < C; c += LANES) {
                REAL *p = to->active + (y * W + x) * C + c;
                store(p, load(p) + load_some(to->gz + x * N + c, K - c));
                store(upward(s, op, to, y + x / W) + x % W * C + c, load_some(to->gz + x * N + K + c, K - c));
            }
    } else {
        const REAL *a = columns(s, op, w, y, rows, to->tile, &ld);
        add_outer(to->gz, N, a, ld, gw->back, n, op->outputs, wide);
        if (op->columns == PLAIN) add_product(to->gz, N, w->back, to->active + y * W * C, C, n, op->outputs, C);
        else if (op->columns == DEPTHWISE)
            for (int r = 0; r < rows; r++)
                product(to->gz + r * Wo * N, N, w->back, upward(s, op, to, y + r), C, Wo, op->outputs, C);
        else {
            product(to->gz, N, w->back, to->gc, wide, n, op->outputs, wide);
            spread(s, op, y, rows, to->gc, wide, to->active);
        }
    }
    if (op->columns != DEPTHWISE) return;
    int lead = image->pad - op->dilation * (op->kernel - 1) / 2;
    tap_gradients(s->in + ((y * op->stride + lead) * s->W + lead) * C, s->W * C, upward(s, op, to, y), row, gw->dw, rows,
                  Wo, op->stride, C, op->kernel, op->dilation);
}

/* One image of the gradient through one op, added to those on the state. */
static void go_back(const State *s, const Leaving *op, const Weights *w, const Weights *gw, int b, const Gradients *to) {
    const Image *image = s->image;
    long C = s->C, N = op->outputs, Np = padded(N), W = image->width, H = image->height;
    long Ho = out_height(image, op), Wo = out_width(image, op), row = (Wo + 2 * image->pad) * C;
    int step = tile_rows(Wo), depthwise = op->columns == DEPTHWISE;
    if (depthwise) memset(to->up, 0, (Ho + 2 * image->pad) * row * sizeof(REAL));
    for (long y = 0; y < Ho; y += step) {
        int rows = y + step <= Ho ? step : Ho - y;
        long n = rows * Wo, at = (b * Ho + y) * Wo;
        const REAL *g = op->g + at * op->ldg;
        if (op->coef) norm_rows(op->coef, g, op->ldg, op->z + at * N, N, to->gz, Np, n, N);
        else
            for (long x = 0; x < n; x++)
                for (long c = 0; c < N; c += LANES) store(to->gz + x * Np + c, load_some(g + x * op->ldg + c, N - c));
        if (!is_pool(op)) {
            tile_back(s, op, w, gw, y, rows, to);
            continue;
        }
        for (int r = 0; r < rows; r++) {
            const REAL *gz = to->gz + r * Wo * C;
            if (op->kind == AVG_POOL) {
                add_average_row(y + r, op->stride, H, W, C, gz, to->tile, to->g);
                continue;
            }
            pool_row(s->raw, 1, y + r, op->stride, H, W, C, to->tile, to->gc);
            add_max_row(s->raw, y + r, op->stride, H, W, C, to->gc, gz, to->g);
        }
    }
    for (long y = 0; y < H && depthwise; y++)
        if (op->stride == 1)
            add_taps(upward(s, op, to, y - op->dilation * (op->kernel - 1) / 2) - op->dilation * (op->kernel - 1) / 2 * C,
                     row, w->mirror, to->active + y * W * C, W, C, op->kernel, op->dilation);
        else
            add_strided_taps(upward(s, op, to, 0), row, Ho, w->dw, to->active + y * W * C, y, W, C, op->kernel, op->dilation);
}

/* s[k] += sum g z[k] over one image for every term with a BatchNorm, and s[n] += sum g. */
static void add_sums(const Term *terms, int n, const REAL *g, long ldg, long first, long pixels, int C, double *s) {
    for (long from = 0; from < pixels; from += SUM_PIXELS) {
        int count = from + SUM_PIXELS <= pixels ? SUM_PIXELS : pixels - from;
        for (int c = 0; c < C; c += LANES)
            for (int k = 0; k <= n; k++) {
                int left = C - c;
                const REAL *p = g + from * ldg + c;
                vec a = {0};
                if (k == n)
                    for (int x = 0; x < count; x++) a += load_some(p + x * ldg, left);
                else if (terms[k].mean) {
                    const REAL *z = terms[k].z + (first + from) * terms[k].ld + c;
                    for (int x = 0; x < count; x++) a += load_some(p + x * ldg, left) * load_some(z + x * terms[k].ld, left);
                }
                for (int l = 0; l < LANES && l < left; l++) s[k * C + c + l] += a[l];
            }
    }
}

/* The gradient on a state, (B, H, W, C) in `out`, from those on what leaves it; the gradients of the
 * weights; and those of the BatchNorms that arrive, with the `coef` of each.
 *
 * `terms` are what the state is read from, `arriving` what it was the sum of. With `out` NULL nothing
 * but one SKIP leaves, whose gradient is that on the state. */
EXPORT int backward_state(const Term *terms, int n, const Term *arriving, int arrived, const Leaving *ops, int m,
                          REAL *out, Image image) {
    long channels = image.channels, C = padded(channels), pixels = image.height * image.width;
    size_t weights = all_weights(ops, m, C), edge = bordered(&image) * C + 2 * LANES, whole = pixels * C;
    size_t tile = 0, count = (arrived + 1) * channels;
    int activated = 0, pools = 0;
    for (int k = 0; k < m; k++) {
        if (tile_size(&image, ops + k) > tile) tile = tile_size(&image, ops + k);
        activated |= reads_activated(ops + k);
        pools |= is_pool(ops + k);
    }
    REAL *memory = malloc((weights + 1) * sizeof(REAL)), *partial = calloc(image.threads * weights + 1, sizeof(REAL));
    Weights *packed = malloc((m + 1) * sizeof(Weights));
    double *sums = calloc(image.batch * count, sizeof(double));
    int failed = !memory || !partial || !packed || !sums, threads = failed ? 0 : image.threads;
    for (size_t k = 0, used = 0; k < (size_t)m && !failed; used += weights_size(ops + k, C), k++)
        packed[k] = pack_weights(ops + k, channels, memory + used);
#pragma omp parallel for schedule(static, 1) num_threads(image.threads) reduction(| : failed)
    for (int t = 0; t < threads; t++) {
        State s = {&image, C, image.width + 2 * image.pad, pixels, NULL, NULL};
        if (out) s.raw = scratch(3 * whole + 2 * edge + 3 * tile);
        if (out && !s.raw) {
            failed = 1;
            continue;
        }
        s.in = s.raw + whole;
        Gradients to = {.g = s.in + edge};
        to.active = to.g + whole, to.up = to.active + whole, to.gz = to.up + edge, to.gc = to.gz + tile,
        to.tile = to.gc + tile;
        for (long b = image.batch * t / threads; b < image.batch * (t + 1) / threads; b++) {
            double *sum = sums + b * count;
            if (!out) {
                add_sums(arriving, arrived, ops->g + b * pixels * ops->ldg, ops->ldg, b * pixels, pixels, channels, sum);
                continue;
            }
            if (activated || pools) assemble(&s, terms, n, b, NULL, 0, pools, activated);
            memset(to.g, 0, (activated ? 2 : 1) * whole * sizeof(REAL));
            for (int k = 0, used = 0; k < m; used += weights_size(ops + k, C), k++) {
                const Leaving *op = ops + k;
                if (op->kind == SKIP) {
                    const REAL *g = op->g + b * pixels * op->ldg;
                    for (long c = 0; c < C; c += LANES)
                        for (long x = 0; x < pixels; x++)
                            store(to.g + x * C + c, load(to.g + x * C + c) + load_some(g + x * op->ldg + c, channels - c));
                    continue;
                }
                Weights gw = lay_out(op, C, partial + t * weights + used);
                go_back(&s, op, packed + k, &gw, b, &to);
            }
            for (long y = 0; y < image.height && activated; y++)
                for (long x = 0; x < image.width; x++) {
                    REAL *g = to.g + (y * image.width + x) * C, *through = to.active + (y * image.width + x) * C;
                    for (long c = 0; c < C; c += LANES) {
                        mask dead = load(pixel(&s, y, x) + c) <= (REAL)0;
                        store(g + c, load(g + c) + (vec)((mask)load(through + c) & ~dead));
                    }
                }
            if (arrived) add_sums(arriving, arrived, to.g, C, b * pixels, pixels, channels, sum);
            store_rows(to.g, C, out + b * pixels * channels, pixels, channels);
        }
    }
    for (int k = 0, used = 0; k < m && !failed; used += weights_size(ops + k, C), k++) {
        const Leaving *op = ops + k;
        long kk = op->kernel * op->kernel, K = padded(op->inputs);
        for (int t = 0; t < threads; t++) {
            Weights gw = lay_out(op, C, partial + t * weights + used);
            for (long c = 0; c < channels && op->gdw; c++)
                for (long i = 0; i < kk; i++) op->gdw[c * kk + i] += gw.dw[i * C + c];
            for (long o = 0; o < op->outputs && op->gpw; o++)
                for (long i = 0; i < op->inputs; i++) op->gpw[o * op->inputs + i] += gw.back[o * K + i];
        }
    }
    for (long b = 1; b < image.batch && !failed; b++)
        for (size_t c = 0; c < count; c++) sums[c] += sums[b * count + c];
    for (int k = 0; k < arrived && !failed; k++) {
        const Term *term = arriving + k;
        const double *s1 = sums + arrived * channels, *s2 = sums + k * channels;
        if (!term->mean) continue;
        for (long c = 0; c < channels; c++) {
            term->dgamma[c] = (REAL)(term->rstd[c] * (s2[c] - term->mean[c] * s1[c]));
            term->dbeta[c] = (REAL)s1[c];
        }
        norm_gradient(term->mean, term->rstd, term->gamma, s1, s2, (double)image.batch * pixels, channels, term->coef);
    }
    free(sums);
    free(packed);
    free(partial);
    free(memory);
    return failed;
}
#endif
