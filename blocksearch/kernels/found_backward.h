/* A found cell backward: one pass over a state completes the gradient on it.
 *
 * It is complete once all ops that leave the state have gone; in the same pass the sums are taken from
 * which the BatchNorms of what arrives there have their gradients.
 */
#ifndef FOUND_BACKWARD_H
#define FOUND_BACKWARD_H
#include "state.h"

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
